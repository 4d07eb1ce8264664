"use strict";
const add = (parent, tag, text) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
};
fetch("openapi.json").then((answer) => answer.json()).then((api) => {
  const main = document.getElementById("main");
  main.textContent = "";
  const schemas = (api.components || {}).schemas || {};
  const resolved = (schema) => (schema && schema.$ref ? schemas[schema.$ref.split("/").pop()] : schema) || {};
  const kind = (schema) => {
    if (!schema) return "";
    if (schema.$ref) return schema.$ref.split("/").pop();
    const several = schema.anyOf || schema.oneOf;
    if (several) return several.map(kind).join(" or ");
    if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" or ");
    if (schema.const !== undefined) return JSON.stringify(schema.const);
    return schema.type === "array" ? "list of " + kind(schema.items) : schema.type || "any";
  };
  const fields = (schema) => {
    const table = add(main, "table");
    const head = add(add(table, "thead"), "tr");
    for (const name of ["Field", "Type", "Meaning"]) add(head, "th", name);
    const rows = add(table, "tbody");
    for (const [name, field] of Object.entries(schema.properties || {})) {
      const row = add(rows, "tr");
      add(add(row, "td"), "code", name + ((schema.required || []).includes(name) ? " *" : ""));
      add(row, "td", kind(field));
      add(row, "td", field.description || "");
    }
  };
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, one] of Object.entries(methods)) {
      add(main, "h2", method.toUpperCase() + " " + path);
      add(main, "p", one.description || "");
      const sent = one.requestBody && resolved(one.requestBody.content["application/json"].schema);
      if (sent) { add(main, "h3", "Sent (* is required)"); fields(sent); }
      const json = ((one.responses["200"] || {}).content || {})["application/json"];
      if (json) { add(main, "h3", "Answered"); fields(resolved(json.schema)); }
    }
  }
}).catch((error) => { document.getElementById("main").textContent = String(error); });
