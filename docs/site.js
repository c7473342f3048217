// From the file system browsers let no script read the search index: `mkdocs serve` has the search.
if (location.protocol === "file:") document.querySelector(".md-search")?.remove();
