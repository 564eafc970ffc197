// Tables sort by a click on a header, pictures open large, and names in a legend hide their lines.
const cellText = (row, column) => row.cells[column].textContent.trim();
const cellNumber = text => parseFloat(text.replace(/,/g, ""));

document.querySelectorAll("table").forEach(table => {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2) return;
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    header.classList.add("sortable");
    header.tabIndex = 0;
    const sort = () => {
      const falls = header.getAttribute("aria-sort") === "ascending";
      const rows = [...body.rows];
      const isNumeric = rows.every(row => cellText(row, column) === "" || !isNaN(cellNumber(cellText(row, column))));
      const compare = (a, b) => isNumeric
        ? (cellNumber(a) || 0) - (cellNumber(b) || 0) : a.localeCompare(b, undefined, {numeric: true});
      rows.sort((a, b) => compare(cellText(a, column), cellText(b, column)) * (falls ? -1 : 1));
      [...header.parentNode.cells].forEach(other => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", falls ? "descending" : "ascending");
      body.append(...rows);
    };
    header.addEventListener("click", sort);
    header.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
});

document.querySelectorAll("figure img").forEach(image => image.addEventListener("click", () => {
  const dialog = document.createElement("dialog");
  dialog.append(image.cloneNode());
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}));

document.querySelectorAll("svg [id^=name-]").forEach(name => name.addEventListener("click", () => {
  const line = name.closest("svg").querySelector(`[id="${name.id.replace("name", "line")}"]`);
  if (!line) return;
  const isOff = name.classList.toggle("is-off");
  line.style.display = isOff ? "none" : "";
}));
