"use strict";
// Draws each chart's variant that its select elements name, and lists its numbers as a table.
const CONFIG = {
  responsive: true,
  displaylogo: false,
  modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
};
const NARROW = 500, LINE = 16; // pixels: a phone's plot, a line of its legend

// Base64 of gzip -> text.
const unpack = (id) => {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};

const plain = (text) => String(text).replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&").trim();
const show = (value) => {
  if (typeof value === "string") return plain(value);
  return value === undefined || Number.isNaN(value) ? "—" : String(Number(value.toPrecision(4)));
};
// Plotly's typed arrays: base64 of float32, in rows where there is a shape.
const decoded = (values) => {
  if (Array.isArray(values)) return values;
  const bytes = Uint8Array.from(atob(values.bdata), (letter) => letter.charCodeAt(0));
  const numbers = [...new Float32Array(bytes.buffer)];
  if (!values.shape) return numbers;
  const columns = Number(values.shape.split(",")[1]);
  return Array.from({ length: numbers.length / columns }, (_, row) => numbers.slice(row * columns, (row + 1) * columns));
};

const numbersOf = ({ data, layout }) => {
  const [x, y] = [layout.xaxis, layout.yaxis].map((axis) => axis.title.text);
  if (data[0]?.type === "heatmap") {
    const { x: blocks, y: modules, z } = data[0];
    return { head: ["layer", ...decoded(blocks).map((block) => `block ${block}`)], rows: decoded(z).map((row, i) => [modules[i], ...row]) };
  }
  if (data.some((trace) => trace.hovertext)) { // named points, with lines to compare with
    const points = data.filter((trace) => trace.hovertext).flatMap((trace) => {
      const [sizes, values] = [decoded(trace.x), decoded(trace.y)];
      return trace.hovertext.map((name, i) => [name, sizes[i], values[i], trace.customdata[i]]);
    });
    const lines = data.filter((trace) => trace.name && trace.hovertemplate && !trace.hovertext);
    const references = lines.map((trace) => [trace.name, "—", decoded(trace.y)[0], "uncompressed"]);
    return { head: ["run", x, y, "place"], rows: [...points, ...references] };
  }
  const across = data[0]?.orientation === "h"; // one row per place on the axis, one column per trace
  const columns = data.map((trace) => {
    const [places, values] = across ? [trace.y, decoded(trace.x)] : [decoded(trace.x), decoded(trace.y)];
    return new Map(places.map((place, i) => [place, values[i]]));
  });
  const places = [...new Set(columns.flatMap((column) => [...column.keys()]))];
  if (!across) places.sort((a, b) => a - b);
  return {
    head: across ? ["run", ...data.map((trace) => `${trace.name}, ${x}`)] : [x, ...data.map((trace) => trace.name)],
    rows: (across ? places.reverse() : places).map((place) => [place, ...columns.map((column) => column.get(place))]),
  };
};

const cell = (row, tag, text, scope) => {
  const element = document.createElement(tag);
  element.textContent = show(text);
  if (scope) element.scope = scope;
  if (typeof text === "number") element.className = "number";
  row.append(element);
};
const writeNumbers = (table, figure) => {
  const { head, rows } = numbersOf(figure);
  table.replaceChildren();
  table.createCaption().textContent = figure.layout.meta.alt;
  const top = table.createTHead().insertRow();
  head.forEach((text, column) => {
    cell(top, "th", text, "col");
    if (typeof rows[0]?.[column] === "number") top.cells[column].className = "number";
  });
  const body = table.createTBody();
  for (const [name, ...values] of rows) {
    const row = body.insertRow();
    cell(row, "th", name, "row");
    values.forEach((value) => cell(row, "td", value));
  }
};

const prepare = (chart, variants, template) => {
  const keys = Object.keys(variants).map((key) => `${key}|`);
  const selects = [...chart.querySelectorAll("select")];
  const plot = chart.querySelector(".plot");
  const note = chart.querySelector(".note");
  const numbers = chart.querySelector(".numbers");
  const chosen = () => selects.map((select) => select.value).join("|");
  // What a choice further left rules out cannot be chosen.
  const restrict = () => selects.forEach((select, index) => {
    const before = selects.slice(0, index).map((other) => `${other.value}|`).join("");
    for (const option of select.options) {
      option.disabled = index > 0 && !keys.some((key) => key.startsWith(`${before}${option.value}|`));
    }
    if (select.selectedOptions[0]?.disabled) select.value = [...select.options].find((option) => !option.disabled)?.value;
  });
  const draw = () => {
    restrict();
    const figure = variants[chosen()];
    plot.hidden = numbers.hidden = !figure;
    note.textContent = figure ? figure.layout.meta.note : "There is no such number for this choice.";
    if (!figure) return;
    plot.setAttribute("aria-label", figure.layout.meta.alt);
    const { data, layout } = structuredClone(figure);
    const legend = data.filter((trace) => trace.name && trace.showlegend !== false).length;
    if (plot.clientWidth < NARROW && legend > 4) layout.height += LINE * legend; // one below the other
    Plotly.react(plot.firstElementChild, data, { ...layout, template }, CONFIG);
    if (numbers.open) writeNumbers(numbers.querySelector("table"), figure);
  };
  numbers.addEventListener("toggle", () => {
    if (numbers.open) writeNumbers(numbers.querySelector("table"), variants[chosen()]);
  });
  selects.forEach((select) => select.addEventListener("change", draw));
  draw();
};

const chartsDrawn = (async () => {
  const script = document.createElement("script");
  script.textContent = await unpack("packed-plotly");
  document.head.append(script);
  const { template, charts } = JSON.parse(await unpack("packed-figures"));
  for (const chart of document.querySelectorAll("[data-chart]")) prepare(chart, charts[chart.id], template);
  document.getElementById("js-plotly-tester")?.setAttribute("aria-hidden", "true"); // plotly measures text in it
})().catch((error) => {
  document.querySelectorAll("[data-chart] .note").forEach((note) => { note.textContent = `The chart cannot be drawn: ${error.message}`; });
  throw error;
});
