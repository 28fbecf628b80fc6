// The charts of an HTML report: its data stand in a script element of JSON, written by page.py.

const number = (value) => (value == null ? "–" : Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 }));

for (const chart of JSON.parse(document.getElementById("charts").textContent)) {
  const figure = document.getElementById(chart.id);
  const show = (value) => (value == null ? "–" : `${number(value)}${chart.unit ? ` ${chart.unit}` : ""}`);
  const values = [...figure.querySelectorAll("b")];
  const tell = (at) => values.forEach((value, place) => (value.textContent = at == null ? "" : show(chart.series[place].values[at])));
  draw(figure.querySelector(".plot"), { x: chart.x, series: chart.series, show, tick: (value) => (chart.whole && !Number.isInteger(value) ? "" : `${number(value)} ${chart.xUnit}`), least: 0, onCursor: tell });
}
