"use strict";
// Sorts, filters and narrows the table of all runs. Each keeps what the others have done.
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

const filters = document.querySelector(".filters");
if (filters) {
  const rows = [...document.querySelector(".runs").tBodies[0].rows];
  const search = filters.querySelector("input[type=search]");
  const selects = [...filters.querySelectorAll("select")];
  const status = filters.querySelector("[role=status]");
  const reset = filters.querySelector("button");
  const text = (row, column) => row.cells[column].textContent.trim();
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const names = [0, 1, 2, 3].map((column) => text(row, column).toLowerCase()).join(" ");
      const fits = words.every((word) => names.includes(word))
        && selects.every((select) => !select.value || text(row, Number(select.dataset.column)) === select.value);
      row.hidden = !fits;
      shown += fits;
    }
    status.textContent = `${shown} of ${rows.length} rows shown`;
    reset.disabled = !words.length && selects.every((select) => !select.value);
  };
  filters.addEventListener("input", apply);
  reset.addEventListener("click", () => {
    search.value = "";
    selects.forEach((select) => { select.value = ""; });
    apply();
    search.focus();
  });
  apply();
}

const columns = document.querySelector(".columns");
if (columns) {
  const [groups, ...others] = [...document.querySelectorAll(".runs tr")];
  columns.addEventListener("change", (event) => {
    const heading = groups.cells[Number(event.target.value) + 1]; // the first cell is above the names
    const first = [...groups.cells].slice(0, heading.cellIndex).reduce((sum, cell) => sum + cell.colSpan, 0);
    heading.hidden = !event.target.checked;
    for (const row of others) {
      [...row.cells].slice(first, first + heading.colSpan).forEach((cell) => { cell.hidden = heading.hidden; });
    }
  });
}
