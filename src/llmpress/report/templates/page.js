"use strict";
// Links open what they lead to; on paper everything is open but the charts' numbers.
const openTarget = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", openTarget);
openTarget();

const PRINT_WIDTH = 680; // pixels of an A4 page between its margins
const plots = () => document.querySelectorAll(".js-plotly-plot");
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open], .numbers)")];
  opened.forEach((details) => { details.open = true; });
  plots().forEach((plot) => Plotly.relayout(plot, { width: PRINT_WIDTH }));
});
addEventListener("afterprint", () => {
  opened.forEach((details) => { details.open = false; });
  plots().forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true }));
});
