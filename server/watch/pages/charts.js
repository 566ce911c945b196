// Line charts as inline SVG, and maps of cells on a canvas.
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 200;
const MARGIN = { left: 54, right: 10, top: 8, bottom: 24 };
const COLOURS = 7;
const MOST_ROWS = 300;

export function styleOf(index) {
  return `c${index % COLOURS} d${Math.floor(index / COLOURS) % 4}`;
}

// "1 round", "2 rounds".
export function counted(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

export function element(name, attributes = {}, text = "") {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== "") made.textContent = text;
  return made;
}

export function shape(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== "") made.textContent = text;
  return made;
}

// A piece of a curve as its legend shows it.
export function swatch(style) {
  const key = shape("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
  key.append(shape("line", { class: `series ${style}`, x1: 1, x2: 25, y1: 5, y2: 5 }));
  return key;
}

// Values at which an axis has its lines: 1, 2 or 5 times a power of ten apart.
function ticks(low, high, count, smallest = 0) {
  const rough = Math.max((high - low) / count || 1, smallest);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) {
    found.push(Math.abs(value) < step * 1e-6 ? 0 : value);
  }
  return found;
}

// Of many points in one column of the screen the lowest and the highest are enough.
function thinned(points, columns) {
  if (points.length <= 2 * columns) return points;
  const size = Math.ceil(points.length / columns);
  const chosen = [];
  for (let start = 0; start < points.length; start += size) {
    const part = points.slice(start, start + size);
    const low = part.reduce((one, other) => (other[1] < one[1] ? other : one));
    const high = part.reduce((one, other) => (other[1] > one[1] ? other : one));
    chosen.push(...[low, high].sort((one, other) => one[0] - other[0]));
  }
  chosen.push(points[points.length - 1]);
  return chosen;
}

let number = 0;

export class Chart {
  // `write` makes text of a value (for the axis, whose lines are `step` apart), `writeX` of a
  // place along the curve. No value is above `most`.
  constructor(parent, title, about, write, most = Infinity) {
    this.title = title;
    this.most = most;
    this.write = write;
    this.series = [];
    this.marks = [];
    this.at = null;
    const id = `chart-${number++}`;
    this.figure = element("figure");
    const caption = element("figcaption", { id });
    caption.append(element("b", {}, title), element("br"), element("span", {}, about));
    // Arrow keys move along the curve, as a pointer does.
    this.plot = element("div", { class: "plot", tabindex: "0", role: "group", "aria-labelledby": id, "aria-describedby": `${id}-readout` });
    this.svg = shape("svg", { role: "img", "aria-label": `${title}: nothing measured yet` });
    this.plot.append(this.svg);
    this.readout = element("p", { class: "readout", id: `${id}-readout` });
    this.details = element("details");
    this.details.append(element("summary", {}, "Numbers"));
    this.region = element("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": `Numbers: ${title}` });
    this.details.append(this.region);
    this.figure.append(caption, this.plot, this.readout, this.details);
    parent.append(this.figure);
    this.plot.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.plot.addEventListener("pointerleave", () => this.moveTo(null));
    this.plot.addEventListener("blur", () => this.moveTo(null));
    this.plot.addEventListener("keydown", (event) => this.press(event));
    this.details.addEventListener("toggle", () => this.fillTable());
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  // series: [{ name, style, points: [[x, y], ...] }]; marks: places where a task begins.
  show(series, marks, writeX) {
    this.series = series.filter((each) => each.points.length);
    this.marks = marks;
    this.writeX = writeX;
    this.figure.hidden = !this.series.length;
    this.draw();
    this.fillTable();
  }

  places() {
    const all = new Set();
    for (const each of this.series) for (const [x] of each.points) all.add(x);
    return [...all].sort((one, other) => one - other);
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width || !this.series.length) return;
    const xs = this.places();
    let [left, right] = [xs[0], xs[xs.length - 1]];
    if (left === right) [left, right] = [left - 0.5, right + 0.5];
    let [low, high] = [Infinity, -Infinity];
    for (const each of this.series) for (const [, y] of each.points) [low, high] = [Math.min(low, y), Math.max(high, y)];
    if (high - low < 1e-9) [low, high] = [Math.min(low, low - Math.abs(low) * 0.1 - 0.01), high + Math.abs(high) * 0.1 + 0.01];
    const pad = (high - low) * 0.06;
    [low, high] = [low >= 0 ? Math.max(0, low - pad) : low - pad, Math.min(high + pad, Math.max(high, this.most))];
    const inner = width - MARGIN.left - MARGIN.right;
    const tall = HEIGHT - MARGIN.top - MARGIN.bottom;
    this.toX = (x) => MARGIN.left + ((x - left) / (right - left)) * inner;
    const toY = (y) => MARGIN.top + (1 - (y - low) / (high - low)) * tall;
    const parts = [];
    const values = ticks(low, high, 4);
    const step = values.length > 1 ? values[1] - values[0] : 0;
    for (const value of values) {
      const y = toY(value);
      parts.push(shape("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }));
      parts.push(shape("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, this.write(value, step)));
    }
    for (const mark of this.marks) {
      if (mark <= left || mark >= right) continue;
      parts.push(shape("line", { class: "task", x1: this.toX(mark), x2: this.toX(mark), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
    }
    for (const value of ticks(left, right, Math.max(2, Math.floor(inner / 80)), 1)) {
      const x = this.toX(value);
      // At the edge of the picture the text stands before its place.
      const anchor = x > width - 24 ? "end" : "middle";
      parts.push(shape("text", { x: anchor === "end" ? width - 2 : x, y: HEIGHT - 6, "text-anchor": anchor }, this.writeX(value, true)));
    }
    for (const each of this.series) {
      const points = thinned(each.points, inner).map(([x, y]) => `${this.toX(x).toFixed(1)},${toY(y).toFixed(1)}`);
      parts.push(shape("polyline", { class: `series ${each.style}`, points: points.join(" ") }));
      const [x, y] = each.points[each.points.length - 1];
      parts.push(shape("circle", { class: `dot ${each.style}`, cx: this.toX(x), cy: toY(y), r: 3.5 }));
    }
    this.cursor = shape("line", { class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    parts.push(this.cursor);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("height", HEIGHT);
    this.svg.replaceChildren(...parts);
    this.svg.setAttribute("aria-label", this.described());
    this.moveTo(this.at);
  }

  described() {
    const parts = this.series.slice(0, 8).map((each) => {
      const ends = [each.points[0], each.points[each.points.length - 1]].map(([, y]) => this.write(y));
      return `${each.name} ${ends[0]} at first, ${ends[1]} now`;
    });
    return `${this.title}. ${parts.join("; ")}`;
  }

  point(offset) {
    const xs = this.places();
    if (!xs.length || !this.toX) return;
    this.moveTo(xs.reduce((one, other) => (Math.abs(this.toX(other) - offset) < Math.abs(this.toX(one) - offset) ? other : one)));
  }

  press(event) {
    const xs = this.places();
    const last = xs.length - 1;
    const now = this.at === null ? last + 1 : xs.indexOf(this.at);
    const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[event.key];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    this.moveTo(xs[Math.max(0, Math.min(last, next))]);
  }

  moveTo(x) {
    this.at = x;
    if (!this.cursor) return;
    const isShown = x !== null && x !== undefined;
    this.cursor.setAttribute("visibility", isShown ? "visible" : "hidden");
    // A listener hears the readout only while it moves along the curve itself.
    if (isShown) this.readout.setAttribute("aria-live", "polite");
    else this.readout.removeAttribute("aria-live");
    if (!isShown) {
      if (this.series.length > 4) this.readout.textContent = "";
      else this.tell("Now", this.series.map((each) => [each, each.points[each.points.length - 1][1]]));
      return;
    }
    this.cursor.setAttribute("x1", this.toX(x));
    this.cursor.setAttribute("x2", this.toX(x));
    const values = [];
    for (const each of this.series) {
      const found = each.points.find(([place]) => place === x);
      if (found) values.push([each, found[1]]);
    }
    this.tell(this.writeX(x), values);
  }

  // The values of curves at a place; where there are several, each with a piece of its curve.
  tell(place, values) {
    const items = values.map(([series, value]) => {
      const item = element("span", { class: "value" }, `${series.name} ${this.write(value)}`);
      if (this.series.length > 1) item.prepend(swatch(series.style));
      return item;
    });
    this.readout.replaceChildren(`${place}: `, ...items.flatMap((item, index) => (index ? [" · ", item] : [item])));
  }

  fillTable() {
    if (!this.details.open) return;
    const table = element("table");
    const head = element("tr");
    head.append(element("th", { scope: "col" }, "At"));
    for (const each of this.series) head.append(element("th", { scope: "col" }, each.name));
    const top = element("thead");
    top.append(head);
    const body = element("tbody");
    const columns = this.series.map((each) => new Map(each.points));
    for (const x of this.places().slice(-MOST_ROWS).reverse()) {
      const row = element("tr");
      row.append(element("th", { scope: "row" }, this.writeX(x)));
      for (const column of columns) row.append(element("td", {}, column.has(x) ? this.write(column.get(x)) : "–"));
      body.append(row);
    }
    table.append(top, body);
    this.region.replaceChildren(table);
  }
}

// A map of cells: a row for each client or task, a column for each round or evaluation.
export class CellMap {
  constructor(parent, title, about, isWide) {
    this.figure = element("figure", isWide ? { class: "wide" } : {});
    this.title = title;
    const caption = element("figcaption");
    this.about = element("span", {}, about);
    caption.append(element("b", {}, title), element("br"), this.about);
    this.legend = element("p", { class: "legend" });
    this.canvas = element("canvas", { role: "img", "aria-label": title });
    this.readout = element("p", { class: "readout" });
    this.figure.append(caption, this.legend, this.canvas, this.readout);
    // Nothing to show yet: an empty canvas has a height all the same.
    this.figure.hidden = true;
    parent.append(this.figure);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => { this.readout.textContent = this.rest; });
    new ResizeObserver(() => this.draw()).observe(this.figure);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // rows, columns: names; colour(row, column): a CSS colour or null; tell(row, column): text.
  show({ rows, columns, colour, tell, label, about = "" }) {
    this.data = { rows, columns, colour, tell };
    this.rest = about;
    this.readout.textContent = about;
    this.figure.hidden = !rows.length || !columns.length;
    this.canvas.setAttribute("aria-label", label);
    this.draw();
  }

  draw() {
    if (!this.data || this.figure.hidden) return;
    const { rows, columns, colour } = this.data;
    const ratio = window.devicePixelRatio || 1;
    const width = this.canvas.clientWidth;
    if (!width) return;
    const context = this.canvas.getContext("2d");
    context.font = "12px system-ui, sans-serif";
    const longest = Math.max(...rows.map((row) => context.measureText(row).width));
    const left = Math.min(Math.ceil(longest) + 8, width * 0.35);
    const high = rows.length > 120 ? 3 : rows.length > 40 ? 7 : rows.length > 10 ? 15 : 20;
    const wide = Math.min((width - left) / columns.length, 36);
    this.geometry = { left, high, wide };
    const height = rows.length * high;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.height = `${height}px`;
    context.scale(ratio, ratio);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--soft");
    const every = Math.ceil(13 / high);
    const gap = wide > 5 ? 1 : 0;
    rows.forEach((name, row) => {
      const isNew = row === 0 || rows[row - 1] !== name;
      if (row % every === 0 || (isNew && high > 7)) {
        context.fillStyle = ink;
        context.fillText(name, 0, row * high + high / 2, left - 6);
      }
      columns.forEach((_, column) => {
        const value = colour(row, column, style);
        if (value === null) return;
        context.fillStyle = value;
        context.fillRect(left + column * wide, row * high, wide - gap, high - (high > 5 ? 1 : 0));
      });
    });
  }

  point(event) {
    if (!this.geometry) return;
    const { left, high, wide } = this.geometry;
    const column = Math.floor((event.offsetX - left) / wide);
    const row = Math.floor(event.offsetY / high);
    const { rows, columns, tell } = this.data;
    const isInside = column >= 0 && column < columns.length && row >= 0 && row < rows.length;
    this.readout.textContent = isInside ? tell(row, column) : this.rest;
  }
}
