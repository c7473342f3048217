"use strict";
const CONFIG = {
  responsive: true,
  displaylogo: false,
  modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
};
const PRINT_WIDTH = 680; // pixels of an A4 page between its margins

for (const chart of document.querySelectorAll("[data-chart]")) {
  const variants = JSON.parse(chart.querySelector('script[type="application/json"]').textContent);
  const selects = [...chart.querySelectorAll("select")];
  const plot = chart.querySelector(".plot");
  const note = chart.querySelector(".note");
  const draw = () => {
    const figure = variants[selects.map((select) => select.value).join("|")];
    plot.hidden = !figure;
    note.textContent = figure ? figure.layout.meta.note : "There is no such number for this choice.";
    if (!figure) return;
    plot.setAttribute("aria-label", figure.layout.meta.alt);
    Plotly.react(plot, structuredClone(figure.data), structuredClone(figure.layout), CONFIG);
  };
  selects.forEach((select) => select.addEventListener("change", draw));
  draw();
}

for (const table of document.querySelectorAll("[data-sortable]")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...body.rows].sort((first, second) => {
        const a = key(first, column), b = key(second, column);
        if (a === "" || b === "") return (a === "") - (b === ""); // no number: always last
        return descending ? compare(b, a) : compare(a, b);
      });
      body.append(...rows);
    });
  });
}

const openTarget = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", openTarget);
openTarget();

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((details) => { details.open = true; });
  document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.relayout(plot, { width: PRINT_WIDTH }));
});
addEventListener("afterprint", () => {
  opened.forEach((details) => { details.open = false; });
  document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true }));
});
