"use strict";
const add = (parent, tag, text) => { const made = document.createElement(tag); if (text) made.textContent = text; parent.append(made); return made; };

fetch("/openapi.json").then((answer) => answer.json()).then((api) => {
  const main = document.getElementById("paths");
  main.style.display = "block";
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, about] of Object.entries(methods)) {
      const box = add(main, "details");
      add(box, "summary", `${method.toUpperCase()} ${path} · ${about.summary || ""}`);
      add(box, "p", about.description || "");
      for (const p of about.parameters || []) add(box, "p", `${p.in} ${p.name}${p.required ? " (needed)" : ""}: ${p.description || (p.schema && p.schema.type) || ""}`);
      for (const [kind, body] of Object.entries((about.requestBody && about.requestBody.content) || {})) {
        add(box, "p", kind);
        const name = body.schema.$ref ? body.schema.$ref.split("/").pop() : null;
        add(box, "pre", JSON.stringify(name ? api.components.schemas[name] : body.schema, null, 1));
      }
    }
  }
});
