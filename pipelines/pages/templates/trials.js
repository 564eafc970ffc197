// Trials of a search: drag along an axis, or click a value, to keep the lines and the rows of the trials that pass there.
document.querySelectorAll("svg.parallel").forEach(svg => {
  const lines = [...svg.querySelectorAll("[data-trial]")].map(line => (
    {line, name: line.dataset.trial, heights: [...line.points].map(point => point.y)}));
  const rows = [...svg.closest(".search").querySelectorAll("tr[data-trials]")];
  const brushes = [...svg.querySelectorAll(".axis")].map(() => null); // the top and the bottom of what each axis keeps
  const [text, button] = ["span", "button"].map(name => document.createElement(name));
  text.setAttribute("aria-live", "polite");
  Object.assign(button, {type: "button", className: "reset", textContent: "show all"});
  svg.parentElement.querySelector(".caption").append(" ", text, " ", button);

  const update = () => {
    const isFiltered = brushes.some(Boolean);
    const kept = new Set(lines.filter(({heights}) =>
      brushes.every((brush, axis) => !brush || (heights[axis] >= brush[0] && heights[axis] <= brush[1]))).map(one => one.name));
    lines.forEach(({line, name}) => line.classList.toggle("is-off", !kept.has(name)));
    rows.forEach(row => { row.hidden = isFiltered && !row.dataset.trials.split(" ").some(name => kept.has(name)); });
    svg.querySelectorAll(".brush").forEach((rect, axis) => {
      const [top, bottom] = brushes[axis] || [0, 0];
      rect.setAttribute("y", top);
      rect.setAttribute("height", bottom - top);
    });
    text.textContent = isFiltered ? `${kept.size} of ${lines.length} trials.`
      : "Drag along an axis or click a value to filter the trials and the table below.";
    button.hidden = !isFiltered;
  };
  const keep = (axis, brush) => { brushes[axis] = brush; update(); };
  button.addEventListener("click", () => { brushes.fill(null); update(); });

  svg.querySelectorAll(".axis").forEach((group, axis) => {
    const strip = group.querySelector(".strip");
    let from = null; // where a drag of the mouse began; touch scrolls
    strip.addEventListener("pointerdown", event => {
      if (event.pointerType === "touch" || event.button !== 0) return;
      from = svgPlace(svg, event).y;
      strip.setPointerCapture(event.pointerId);
    });
    strip.addEventListener("pointermove", event => {
      const to = svgPlace(svg, event).y;
      if (from !== null && Math.abs(to - from) > 3) keep(axis, [Math.min(from, to), Math.max(from, to)]);
    });
    strip.addEventListener("pointerup", event => {
      if (from !== null && Math.abs(svgPlace(svg, event).y - from) <= 3) keep(axis, null); // a click
      from = null;
    });
    group.querySelectorAll(".value").forEach(value => {
      const place = +value.dataset.position, brush = [place - 6, place + 6];
      const toggle = () => keep(axis, brushes[axis]?.[0] === brush[0] ? null : brush);
      value.addEventListener("click", toggle);
      value.addEventListener("keydown", event => { if (event.key === "Enter") toggle(); });
    });
  });

  rows.forEach(row => {
    const own = lines.filter(({name}) => row.dataset.trials.split(" ").includes(name));
    ["pointerenter", "pointerleave"].forEach(kind => row.addEventListener(kind, () =>
      own.forEach(({line}) => line.classList.toggle("is-marked", kind === "pointerenter"))));
  });
  update();
});
