// Tables sort by a click on a header, pictures open large, names in a legend hide their lines, and commands are copied.
const cellText = (row, column) => row.cells[column]?.textContent.trim() ?? ""; // a failed trial has fewer cells
const cellNumber = text => {
  const [isTime, hours = 0, minutes = 0, seconds = 0] = text.match(/^(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?$/) || [];
  if (isTime) return 3600 * hours + 60 * minutes + 1 * seconds; // 1h02m, 2m05s, 3s
  return parseFloat(text.replace(/,/g, ""));
};

const compareNames = (a, b) => { // numbers in names by their size: p 0.25 before p 0.5
  const [parts, others] = [a, b].map(text => text.split(/(\d+(?:\.\d+)?)/));
  const at = parts.findIndex((part, place) => part !== others[place]);
  if (at < 0) return a.length - b.length;
  return at % 2 && others[at] ? parts[at] - others[at] : parts[at].localeCompare(others[at] ?? "");
};

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
      const compare = (a, b) => isNumeric ? cellNumber(a) - cellNumber(b) : compareNames(a, b);
      rows.sort((one, other) => {
        const [a, b] = [cellText(one, column), cellText(other, column)];
        return a === "" || b === "" ? (a === "") - (b === "") : compare(a, b) * (falls ? -1 : 1); // empty cells last
      });
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
  const isOff = name.classList.toggle("is-off");
  const [line, part] = ["line", "part"].map(kind => `[id="${name.id.replace("name", kind)}"]`);
  name.closest("svg").querySelectorAll(`${line}, ${part}`).forEach(one => { one.style.display = isOff ? "none" : ""; });
}));

const copyText = async shown => {
  try {
    await navigator.clipboard.writeText(shown.textContent);
  } catch { // a browser may offer no clipboard to a file
    getSelection().selectAllChildren(shown);
    document.execCommand("copy");
  }
};

document.querySelectorAll(".command button").forEach(button => button.addEventListener("click", async () => {
  await copyText(button.parentElement.querySelector("pre"));
  button.textContent = "copied";
}));
