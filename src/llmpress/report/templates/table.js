"use strict";
// Sorts, filters and narrows the tables of runs. Each keeps what the others have done.
for (const table of document.querySelectorAll(".runs")) {
  const body = table.querySelector(".sorted");
  const headings = [...table.tHead.rows[1].cells];
  const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...body.rows].sort((first, second) => {
        const a = key(first, column), b = key(second, column);
        if (a === "—" || b === "—") return (a === "—") - (b === "—"); // no number: always last
        return descending ? compare(b, a) : compare(a, b);
      });
      body.append(...rows);
    });
  });
}

const filters = document.querySelector(".filters");
if (filters) {
  const rows = [...document.querySelectorAll(".runs .sorted tr")];
  const search = filters.querySelector("input[type=search]");
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const names = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
      row.hidden = !words.every((word) => names.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    filters.querySelector("[role=status]").textContent = `${shown} of ${rows.length} runs shown`;
    for (const { value, checked } of filters.querySelectorAll("input[type=checkbox]")) {
      document.querySelectorAll(`.runs [data-group="${value}"]`).forEach((cell) => { cell.hidden = !checked; });
    }
  };
  filters.addEventListener("input", apply);
  apply();
}
