// Plots: drag over a range of x to zoom into it, double-click to return; a point near the pointer shows its values.
const svgPart = (parent, name, attributes, text = "") => {
  const part = document.createElementNS("http://www.w3.org/2000/svg", name);
  Object.entries(attributes).forEach(([key, value]) => part.setAttribute(key, value));
  part.textContent = text;
  parent.append(part);
  return part;
};

const svgPlace = (svg, event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());

// An axis from values to positions.
const plotAxis = (low, high, start, end, isLog) => {
  const [to, from] = isLog ? [Math.log10, power => 10 ** power] : [value => value, value => value];
  const slope = (end - start) / (to(high) - to(low));
  return {
    low, high, isLog,
    position: value => start + (to(value) - to(low)) * slope,
    value: position => from(to(low) + (position - start) / slope),
  };
};

// Round values on an axis: steps of 1, 2 or 5 times a power of ten.
const axisTicks = ({low, high, isLog}) => {
  if (isLog && high / low > 10) {
    const powers = [...Array(Math.ceil(Math.log10(high / low)) + 1).keys()].map(one => one + Math.floor(Math.log10(low)));
    return powers.flatMap(power => [1, 2, 5].map(digit => digit * 10 ** power)).filter(one => one >= low && one <= high);
  }
  const power = 10 ** Math.floor(Math.log10((high - low) / 5));
  const step = power * [1, 2, 5, 10].find(digit => digit * power >= (high - low) / 5);
  const first = Math.ceil(low / step);
  return [...Array(Math.floor(high / step) - first + 1).keys()].map(one => (first + one) * step);
};

const plotNumber = value => Math.abs(value) >= 1000
  ? Math.round(value).toLocaleString("en-US") : `${parseFloat(value.toPrecision(4))}`;

// The coordinates of a part of a plot, and what writes others into it.
const partCoordinates = part => {
  const [name, kind] = {path: ["d"], polyline: ["points"], circle: ["cx", "cy"]}[part.tagName] || ["x", "y"];
  if (kind) {
    const place = [part.getAttribute(name), part.getAttribute(kind)].map(Number);
    return {points: [place], write: move => move(...place).forEach((value, one) => part.setAttribute([name, kind][one], value))};
  }
  const pair = /(-?[\d.]+)[ ,](-?[\d.]+)/g, text = part.getAttribute(name);
  return {
    points: [...text.matchAll(pair)].map(found => [+found[1], +found[2]]),
    write: move => part.setAttribute(name, text.replace(pair, (_, x, y) => move(+x, +y).join(" "))),
  };
};

class PlotPanel {
  constructor(svg, number, card) {
    [this.left, this.top, this.right, this.bottom] = card.box;
    Object.assign(this, {svg, card, group: svg.querySelector(`[id="axes_${number + 1}"]`)});
    this.x = this.wholeX = plotAxis(...card.x, this.left, this.right, card.logs.includes("x"));
    this.y = this.wholeY = plotAxis(...card.y, this.bottom, this.top, card.logs.includes("y"));
    this.parts = [...this.group.querySelectorAll(":is([clip-path], [clip-path] *):is(path, use, circle, polyline)")]
      .filter(part => !part.closest('defs, [id^="matplotlib.axis"]')).map(part => ({
        ...partCoordinates(part), line: part.closest("[id^=line-]"),
      }));
    this.points = this.parts.filter(part => part.line).flatMap(part =>
      part.points.map(([x, y]) => ({line: part.line, x: this.x.value(x), y: this.y.value(y)})));
  }

  holds(place) {
    return place.x >= this.left && place.x <= this.right && place.y >= this.top && place.y <= this.bottom;
  }

  // Show the points from `low` to `high` at the full height of the panel.
  zoom(low, high) {
    const shown = this.points.filter(point => point.x >= low && point.x <= high && point.line.style.display !== "none");
    if (!shown.length || !(high > low)) return;
    const heights = shown.map(point => this.wholeY.position(point.y));
    const space = 0.05 * (Math.max(...heights) - Math.min(...heights)) || 5;
    const [bottom, top] = [Math.max(...heights) + space, Math.min(...heights) - space].map(this.wholeY.value);
    this.show(plotAxis(low, high, this.left, this.right, this.wholeX.isLog),
      plotAxis(bottom, top, this.bottom, this.top, this.wholeY.isLog));
  }

  reset() {
    this.show(this.wholeX, this.wholeY);
  }

  show(x, y) {
    Object.assign(this, {x, y});
    const isZoomed = x !== this.wholeX;
    this.parts.forEach(part => part.write((left, top) => isZoomed
      ? [x.position(this.wholeX.value(left)), y.position(this.wholeY.value(top))] : [left, top]));
    this.group.querySelectorAll("[id^=xtick], [id^=ytick]").forEach(tick => { tick.style.display = isZoomed ? "none" : ""; });
    this.ticks?.remove();
    if (isZoomed) this.drawTicks();
  }

  drawTicks() {
    this.ticks = svgPart(this.svg, "g", {class: "ticks"});
    axisTicks(this.x).forEach(value => svgPart(this.ticks, "text",
      {x: this.x.position(value), y: this.bottom + 14, "text-anchor": "middle"}, plotNumber(value)));
    axisTicks(this.y).forEach(value => {
      const height = this.y.position(value);
      svgPart(this.ticks, "line", {x1: this.left, x2: this.right, y1: height, y2: height});
      svgPart(this.ticks, "text", {x: this.left - 6, y: height + 3, "text-anchor": "end"}, plotNumber(value));
    });
    this.group.before(this.ticks); // below the lines
  }

  // The shown point nearest to a place, if it is near.
  nearest(place) {
    const near = this.points.filter(point => point.line.id in this.card.lines && point.line.style.display !== "none")
      .map(point => ({...point, left: this.x.position(point.x), top: this.y.position(point.y)}))
      .filter(point => this.holds({x: point.left, y: point.top}))
      .map(point => ({...point, distance: Math.hypot(point.left - place.x, point.top - place.y)}))
      .sort((one, other) => one.distance - other.distance)[0];
    return near?.distance < 20 ? near : null;
  }
}

const valuesBox = document.createElement("div");
valuesBox.className = "values";
document.body.append(valuesBox);
const hideValues = () => { valuesBox.style.display = "none"; };

const showValues = (svg, panel, point) => {
  const {x_name, y_name, lines} = panel.card, name = lines[point.line.id];
  valuesBox.textContent = [name, `${x_name} ${plotNumber(point.x)}`, `${y_name} ${plotNumber(point.y)}`].filter(Boolean).join("\n");
  valuesBox.style.display = "block";
  const place = new DOMPoint(point.left, point.top).matrixTransform(svg.getScreenCTM());
  const most = document.documentElement.clientWidth - valuesBox.offsetWidth - 8;
  valuesBox.style.left = `${Math.max(0, Math.min(place.x + 12, most)) + scrollX}px`;
  valuesBox.style.top = `${place.y + 12 + scrollY}px`;
};

document.querySelectorAll("svg[data-panels]").forEach(svg => {
  const panels = JSON.parse(svg.dataset.panels).map((card, number) => new PlotPanel(svg, number, card));
  const panelAt = place => panels.find(panel => panel.holds(place));
  const [hint, button] = ["span", "button"].map(name => document.createElement(name));
  Object.assign(hint, {className: "hint", textContent: "Drag to zoom."});
  Object.assign(button, {type: "button", className: "reset", textContent: "reset zoom"});
  const caption = svg.parentElement.querySelector(".caption");
  caption?.append(" ", hint, button);
  const update = () => { button.hidden = !(hint.hidden = panels.some(panel => panel.x !== panel.wholeX)); };
  const reset = () => { panels.forEach(panel => panel.reset()); update(); };
  button.addEventListener("click", reset);
  svg.addEventListener("dblclick", reset);
  update();

  let drag = null; // a drag of the mouse; touch scrolls
  svg.addEventListener("pointerdown", event => {
    const place = svgPlace(svg, event), panel = panelAt(place);
    hideValues();
    if (panel && event.pointerType !== "touch" && event.button === 0) drag = {panel, from: place.x, area: null};
  });
  svg.addEventListener("pointermove", event => {
    const place = svgPlace(svg, event);
    if (!drag) {
      const panel = panelAt(place), point = panel?.nearest(place);
      return point ? showValues(svg, panel, point) : hideValues();
    }
    drag.to = Math.min(Math.max(place.x, drag.panel.left), drag.panel.right);
    if (!drag.area && Math.abs(drag.to - drag.from) < 4) return;
    if (!drag.area) svg.setPointerCapture(event.pointerId);
    drag.area ??= svgPart(svg, "rect", {class: "dragged", y: drag.panel.top, height: drag.panel.bottom - drag.panel.top});
    drag.area.setAttribute("x", Math.min(drag.from, drag.to));
    drag.area.setAttribute("width", Math.abs(drag.to - drag.from));
  });
  const end = event => {
    if (drag?.area) {
      const {panel, from, to} = drag;
      drag.area.remove();
      if (event.type === "pointerup") panel.zoom(...[from, to].sort((a, b) => a - b).map(panel.x.value));
      update();
    }
    drag = null;
  };
  svg.addEventListener("pointerup", end);
  svg.addEventListener("pointercancel", end);
  svg.addEventListener("pointerleave", event => { if (event.pointerType !== "touch") hideValues(); });
});
