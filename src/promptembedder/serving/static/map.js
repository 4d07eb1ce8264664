// A map of the texts: marks that do not overlap, labels that do not either, and shaded groups.

import { KINDS, mark, roving, shortened, svg } from "./elements.js";
import { hull } from "./geometry.js";

const RADIUS = 11;
const MARGIN = 30;
const LINE = 15;
const measure = document.createElement("canvas").getContext("2d");

// Places in the picture: as large as fits, marks pushed apart where they would overlap.
function placed(places, width, height) {
  const [xs, ys] = [0, 1].map((axis) => places.map((place) => place[axis]));
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const scale = Math.min((width - 2 * MARGIN) / (right - left || 1e-9), (height - 2 * MARGIN) / (high - low || 1e-9), 1e6);
  const points = places.map(([x, y]) => [
    width / 2 + scale * (x - (left + right) / 2),
    height / 2 - scale * (y - (low + high) / 2),
  ]);
  const apart = 2 * RADIUS + 4;
  for (let turn = 0; turn < 80; turn++) {
    let touched = false;
    for (let i = 0; i < points.length; i++) {
      for (let j = 0; j < i; j++) {
        let [dx, dy] = [points[i][0] - points[j][0], points[i][1] - points[j][1]];
        let far = Math.hypot(dx, dy);
        if (far >= apart) continue;
        if (far < 1e-6) [dx, dy, far] = [Math.cos(i), Math.sin(i), 1];
        const push = (apart - Math.min(far, apart)) / 2 + 0.1;
        points[i] = [points[i][0] + (push * dx) / far, points[i][1] + (push * dy) / far];
        points[j] = [points[j][0] - (push * dx) / far, points[j][1] - (push * dy) / far];
        touched = true;
      }
    }
    points.forEach((point) => {
      point[0] = Math.min(width - RADIUS - 4, Math.max(RADIUS + 4, point[0]));
      point[1] = Math.min(height - RADIUS - 4, Math.max(RADIUS + 4, point[1]));
    });
    if (!touched) break;
  }
  return points;
}

const overlap = (a, b) =>
  Math.max(0, Math.min(a.right, b.right) - Math.max(a.left, b.left))
  * Math.max(0, Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top));

const around = ([x, y], r) => ({ left: x - r, right: x + r, top: y - r, bottom: y + r });

// Where a label may be.
function boxes(text, words, [x, y], chosen) {
  const long = measure.measureText(words).width * (chosen ? 1.1 : 1.03) + 2;
  const gap = RADIUS + (chosen ? 8 : 4);
  const starts = [[x + gap, y], [x - gap - long, y], [x - long / 2, y - gap - 8], [x - long / 2, y + gap + 8],
    [x + 5, y - gap - 8], [x + 5, y + gap + 8], [x - long - 5, y - gap - 8], [x - long - 5, y + gap + 8]];
  return starts.map(([left, middle]) =>
    ({ text, words, left, right: left + long, top: middle - LINE / 2, bottom: middle + LINE / 2 }));
}

// A box for each label beside its mark, for those that have room; the selected one first.
function labelled(points, texts, selected, width, height, font) {
  measure.font = font;
  const lengths = [1, 0.6].map((share) => Math.round((share * width) / 14));
  const taken = points.map((point) => around(point, RADIUS + 1));
  const found = [];
  for (const text of [selected, ...points.keys()]) {
    if (found.some((label) => label.text === text)) continue;
    const free = lengths.flatMap((most) => boxes(text, shortened(texts[text], most), points[text], text === selected)).find((box) => box.left > 2 && box.right < width - 2 && box.top > 2 && box.bottom < height - 2
      && taken.every((other) => overlap(box, other) === 0));
    if (!free) continue;
    taken.push(free);
    found.push(free);
  }
  return found;
}

function area(points) {
  const corners = hull(points).map((point) => point.map((x) => x.toFixed(1)).join(","));
  return `M${corners.join("L")}Z`;
}

/* What a map shows.
   view: places, parts (groups under its own instruction), nearest (of the selected text).
   state: texts, label (groups under A), selected.
   select: called with a text, and whether the keyboard chose it. */
export function drawMap(container, name, view, state, select) {
  const width = Math.max(240, Math.floor(container.clientWidth));
  const height = Math.round(Math.min(420, Math.max(300, width * 0.72)));
  const points = placed(view.places, width, height);
  const font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const labels = labelled(points, state.texts, state.selected, width, height, font);
  const shades = view.parts.filter((part) => part.length > 1)
    .map((part) => svg("path", { class: "area", d: area(part.map((text) => points[text])) }));
  const [[x1, y1], [x2, y2]] = [points[state.selected], points[view.nearest[0]]];
  const marks = points.map(([x, y], text) => svg(
    "g",
    {
      class: `point group-${state.label[text] % KINDS}`,
      role: "option",
      id: `map-${name}-${text}`,
      "aria-selected": String(text === state.selected),
      "aria-label": `${text + 1}: ${state.texts[text]}`,
      onclick: () => select(text, `map-${name}-${text}`),
    },
    svg("title", {}, state.texts[text]),
    svg("path", { class: "ring", d: mark(state.label[text], x, y, RADIUS + 4) }),
    svg("path", { class: "mark", d: mark(state.label[text], x, y, RADIUS) }),
    svg("text", { class: "number", x, y }, String(text + 1)),
  ));
  // The selected one lies above the others.
  const order = [...marks.filter((_, text) => text !== state.selected), marks[state.selected]];
  const picture = svg(
    "svg",
    {
      class: "map",
      viewBox: `0 0 ${width} ${height}`,
      width,
      height,
      role: "listbox",
      "aria-label": `Map under instruction ${name.toUpperCase()}`,
    },
    svg("g", { class: "areas" }, shades),
    svg("line", { class: "nearest", x1, y1, x2, y2 }),
    svg("g", { "aria-hidden": "true" }, labels.map((box) => svg(
      "text",
      {
        class: box.text === state.selected ? "label chosen" : "label",
        x: box.left + 1,
        y: (box.top + box.bottom) / 2,
        onclick: () => select(box.text),
      },
      box.words,
    ))),
    order,
  );
  roving(picture, marks, state.selected, (text) => select(text, `map-${name}-${text}`));
  return picture;
}
