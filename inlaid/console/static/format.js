// Figures as people read them, each with its unit.

const none = "–";
const figures = new Intl.NumberFormat("en", { maximumFractionDigits: 6 }); // made once: making it takes longer than a row
const digits = (value, count = 3) => figures.format(Number(value.toPrecision(count)));

export const count = (value) => (value == null ? none : figures.format(Math.round(value)));
export const number = (value, places = 3) => (value == null ? none : digits(value, places));
export const share = (value) => (value == null ? none : `${digits(100 * value)} %`);

export function seconds(value) {
  if (value == null) return none;
  if (value === 0) return "0 s";
  if (value < 1e-3) return `${digits(value * 1e6)} µs`;
  if (value < 1) return `${digits(value * 1e3)} ms`;
  return value < 120 ? `${digits(value)} s` : `${digits(value / 60)} min`;
}

export function bytes(value) {
  if (value == null) return none;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${digits(value)} ${units[unit]}`;
}

export function ago(unix) {
  if (!unix) return "never";
  const passed = Math.max(0, Date.now() / 1000 - unix);
  if (passed < 60) return `${Math.round(passed)} s ago`;
  if (passed < 3600) return `${Math.round(passed / 60)} min ago`;
  return passed < 86400 ? `${Math.round(passed / 3600)} h ago` : `${Math.round(passed / 86400)} d ago`;
}

export const date = (unix) => (unix ? new Date(unix * 1000).toISOString().slice(0, 16).replace("T", " ") + " UTC" : none);
export const clock = (unix, withSeconds) => new Date(unix * 1000).toTimeString().slice(0, withSeconds ? 8 : 5);
