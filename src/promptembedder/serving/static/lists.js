// Nearest texts of the selected one, tables of similarity, and words of the soft tokens.

import { KINDS, chip, html, roving, svg } from "./elements.js";

const MOST_NEAR = 10;

// The head of a card: which instruction it belongs to.
export function heading(name, instruction) {
  return html("p", { class: "under" },
    html("span", { class: "badge" }, name.toUpperCase()), " ", html("bdi", {}, instruction));
}

/* Neighbours under A and B side by side, with a line for each that is on both sides.
   views: under A and B: instruction, cosine, nearest (ranked texts).
   state: texts, label, selected. */
export function nearLists(views, state, select) {
  const count = Math.min(MOST_NEAR, state.texts.length - 1);
  const shown = views.map((view) => view.nearest.slice(0, count));
  const lists = views.map((view, side) => {
    const list = html("ol", {}, shown[side].map((text, place) => {
      const before = views[1 - side].nearest.indexOf(text);
      const cosine = view.cosine[state.selected][text];
      return html("li", {}, html(
        "button",
        { type: "button", class: "near-text", id: `near-${"ab"[side]}-${place}`, onclick: () => select(text, `near-${"ab"[side]}-0`) },
        chip(text, state.label[text]),
        html("bdi", { class: "words" }, state.texts[text]),
        side === 1 && moved(before - place),
        html("span", { class: "cosine" }, cosine.toFixed(2)),
      ));
    }));
    const buttons = [...list.querySelectorAll("button")];
    const stop = (at) => roving(list, buttons, at, (next) => {
      stop(next);
      buttons[next].focus();
    });
    stop(0);
    return html("div", { class: "near-list" }, heading("ab"[side], view.instruction), list);
  });
  const lines = svg(
    "svg",
    { class: "moves", "--rows": String(count), viewBox: `0 0 100 ${count}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    shown[0].map((text, from) => {
      const to = shown[1].indexOf(text);
      const [y1, y2] = [from + 0.5, to + 0.5];
      return to >= 0 && svg("path", {
        class: `group-${state.label[text] % KINDS}`,
        d: `M0,${y1}C50,${y1} 50,${y2} 100,${y2}`,
      });
    }),
  );
  return [lists[0], lines, lists[1]];
}

function moved(steps) {
  const [sign, words] = steps > 0 ? ["▲", "up"] : steps < 0 ? ["▼", "down"] : ["=", "as under A"];
  const kind = steps > 0 ? "up" : steps < 0 ? "down" : "same";
  const many = Math.abs(steps);
  const spoken = many ? `${words} ${many} ${many === 1 ? "place" : "places"} from A` : words;
  return html("span", { class: `moved ${kind}`, title: spoken },
    html("span", { "aria-hidden": "true" }, many ? `${sign}${many}` : sign),
    html("span", { class: "hidden" }, `, ${spoken}`));
}

const short = (x) => x.toFixed(2).replace(/^(-?)0\./, "$1.");

/* A table of cosines.
   view: instruction, cosine, first (nearest text of each); other: under the other instruction.
   state: texts, label, order, selected. */
export function table(name, view, other, state, select) {
  const { texts, order, label, selected } = state;
  const off = order.flatMap((i) => order.filter((j) => j !== i).map((j) => view.cosine[i][j]));
  const [low, high] = [Math.min(...off), Math.max(...off)];
  const rows = order.map((i) => html(
    "tr",
    { class: i === selected ? "chosen" : false },
    html("th", { scope: "row" }, html(
      "button",
      {
        type: "button",
        id: `row-${name}-${i}`,
        "aria-pressed": String(i === selected),
        "aria-label": `${i + 1}: ${texts[i]}`,
        onclick: () => select(i, `row-${name}-${i}`),
      },
      chip(i, label[i]),
      html("bdi", { class: "words", title: texts[i] }, texts[i]),
    )),
    order.map((j) => cell(i, j)),
  ));
  function cell(i, j) {
    if (i === j) return html("td", { class: "self" }, html("span", { class: "hidden" }, "itself"));
    const share = (view.cosine[i][j] - low) / (high - low || 1);
    const first = j === view.first[i];
    const differs = first && view.first[i] !== other.first[i];
    const kinds = [first && "first", differs && "differs", j === selected && "chosen"].filter(Boolean).join(" ");
    return html(
      "td",
      { class: kinds || false, "--share": `${Math.round(100 * share)}%` },
      short(view.cosine[i][j]),
      first && html("span", { class: "hidden" }, differs ? " nearest, differs" : " nearest"),
    );
  }
  const body = html("tbody", {}, rows);
  const buttons = rows.map((row) => row.querySelector("button"));
  roving(body, buttons, order.indexOf(selected), (place) => select(order[place], `row-${name}-${order[place]}`));
  return [
    heading(name, view.instruction),
    html("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": `Similarity under ${name.toUpperCase()}` },
      html("table", { class: order.length > 14 ? "heat many" : "heat", "--columns": String(order.length) },
        html("caption", { class: "hidden" }, `Cosine of every two texts under instruction ${name.toUpperCase()}`),
        html("thead", {}, html("tr", {},
          html("td", {}),
          order.map((j) => html("th", { scope: "col" }, chip(j, label[j]), html("span", { class: "hidden" }, `Text ${j + 1}`))))),
        body)),
    html("p", { class: "scale" }, low.toFixed(2), html("span", { class: "ramp", "aria-hidden": "true" }), high.toFixed(2)),
  ];
}

// A token of the vocabulary as people can read it.
function readable(token) {
  const words = token.replaceAll("\n", "↵").replaceAll("\t", "⇥").trim();
  return words || "␣";
}

/* The words of each soft token, heaviest first; those that the other instruction does not have are marked. */
export function words(name, instruction, tokens, others) {
  const known = new Set((others || []).flatMap((one) => one.words.map((word) => readable(word.text))));
  return [
    heading(name, instruction),
    html("ol", { class: "soft" }, tokens.map((one, n) => html(
      "li",
      { "aria-label": `Soft token ${n + 1}` },
      one.words.map((word) => html(
        "span",
        {
          class: others && !known.has(readable(word.text)) ? "word own" : "word",
          "--share": `${Math.round(100 * word.weight)}%`,
          title: `${(100 * word.weight).toFixed(0)} % of soft token ${n + 1}`,
        },
        html("bdi", {}, readable(word.text)),
        html("span", { class: "hidden" }, ` ${(100 * word.weight).toFixed(0)} %`),
      )),
    ))),
  ];
}
