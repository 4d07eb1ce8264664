// Makes elements. Texts become text nodes, so that nothing of a user is read as HTML.

const SVG = "http://www.w3.org/2000/svg";

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) made.style.setProperty(name, value);
    else made.setAttribute(name, value);
  }
  made.append(...children.flat(2).filter((child) => child !== undefined && child !== false));
  return made;
}

export const html = (tag, attributes = {}, ...children) =>
  filled(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS(SVG, tag), attributes, children);

export const shortened = (text, most) => {
  const characters = [...text];
  return characters.length <= most ? text : `${characters.slice(0, most - 1).join("").trimEnd()}…`;
};

// Colours and shapes of groups; more groups begin again.
export const KINDS = 6;

// The outline of a mark around a point, as an SVG path.
export function mark(group, x, y, r) {
  const corners = [0, 4, 4, 6, 5, 8][group % KINDS];
  if (corners === 0) return `M${x - r},${y}a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0Z`;
  // Of about the area of the circle. The first 4 corners are a square, the second ones a diamond.
  const size = r * ({ 4: 1.25, 5: 1.17, 6: 1.1, 8: 1.06 })[corners];
  const turn = group % KINDS === 1 ? Math.PI / 4 : -Math.PI / 2;
  const points = [...Array(corners).keys()].map((k) => turn + (2 * Math.PI * k) / corners)
    .map((angle) => `${(x + size * Math.cos(angle)).toFixed(1)},${(y + size * Math.sin(angle)).toFixed(1)}`);
  return `M${points.join("L")}Z`;
}

// Number of a text, in colour and shape of its group.
export function chip(text, group) {
  return svg("svg", { class: `chip group-${group % KINDS}`, viewBox: "0 0 26 26", "aria-hidden": "true" },
    svg("path", { d: mark(group, 13, 13, 10) }),
    svg("text", { x: 13, y: 13 }, String(text + 1)));
}

// One stop for Tab among several elements; arrow keys move between them. `moved` gets the next one's place.
export function roving(container, items, current, moved) {
  items.forEach((item, place) => item.setAttribute("tabindex", place === current ? "0" : "-1"));
  container.onkeydown = (event) => {
    const at = items.indexOf(event.target.closest("[tabindex]"));
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = event.key === "Home" ? 0 : event.key === "End" ? items.length - 1
      : step && at >= 0 ? (at + step + items.length) % items.length : undefined;
    if (next === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    moved(next);
  };
}
