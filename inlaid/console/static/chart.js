// A chart of lines over one axis, for the console and for the HTML reports, which have this text in them.

const HEIGHT = 170;
const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6, 1e7];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// series: {label, values}; `show` writes a value, `tick` a place on the x axis; `max` is the top of the y axis, `least` the
// lowest top. `onCursor` is told the index under the pointer, or null. The plot has a method `end`.
export function draw(box, { x, series, show, tick, max, least = 1, whole = false, onCursor = () => {} }) {
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { stroke: colour("--grid") }, font: "12px system-ui, sans-serif" };
  const plot = new window.uPlot(
    {
      width: box.clientWidth || 400,
      height: HEIGHT,
      cursor: { y: false, points: { size: 6 } },
      legend: { show: false },
      scales: { x: { time: tick.length > 1, range: (self, low, high) => (self.data[0].length < 2 ? [low - 300, low + 300] : [low, high]) }, y: { range: (_, low, high) => [0, max ?? Math.max(least, (high || 0) * 1.08)] } },
      axes: [
        { ...axis, space: 80, size: 34, values: (_, ticks, at, space, step) => ticks.map((each) => tick(each, step < 60)) },
        { ...axis, size: (_, values) => 24 + 7 * Math.max(4, ...(values || []).map((each) => each.length)), incrs: whole ? WHOLE : undefined, values: (_, ticks) => ticks.map((each) => show(each)) },
      ],
      series: [{}, ...series.map((each, place) => ({ label: each.label, stroke: colour(`--c${place % 6}`), width: 1.6, points: { show: (self) => self.data[0].length < 12, size: 5 }, spanGaps: each.spanGaps || false }))],
      hooks: { setCursor: [(self) => onCursor(self.cursor.idx)] },
    },
    [x, ...series.map((each) => each.values)],
    box,
  );
  const observer = new ResizeObserver(() => plot.setSize({ width: box.clientWidth, height: HEIGHT }));
  observer.observe(box);
  plot.end = () => {
    observer.disconnect();
    plot.destroy();
  };
  return plot;
}
