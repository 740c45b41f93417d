"use strict";
// Swagger UI on docs.html; on docs-plain.html, which is sent where its files are not installed, a plain list of the same document.
const add = (parent, tag, more = {}) => { const made = Object.assign(document.createElement(tag), more); parent.append(made); return made; };
const load = (tag, more) => new Promise((done, failed) => add(document.head, tag, { ...more, onload: done, onerror: failed }));

function route(box, method, path, about, schemas) {
  const one = add(box, "details");
  add(one, "summary", { textContent: `${method.toUpperCase()} ${path} · ${about.summary || ""}` });
  add(one, "p", { textContent: about.description || "" });
  for (const p of about.parameters || []) add(one, "p", { textContent: `${p.in} ${p.name}${p.required ? " (needed)" : ""}: ${p.description || (p.schema && p.schema.type) || ""}` });
  for (const [kind, body] of Object.entries((about.requestBody && about.requestBody.content) || {})) {
    const name = body.schema.$ref ? body.schema.$ref.split("/").pop() : null;
    add(one, "p", { textContent: kind });
    add(one, "pre", { textContent: JSON.stringify(name ? schemas[name] : body.schema, null, 1) });
  }
}

async function list() {
  const api = await (await fetch("/openapi.json")).json(), box = document.getElementById("api");
  for (const [path, methods] of Object.entries(api.paths)) for (const [method, about] of Object.entries(methods)) route(box, method, path, about, (api.components || {}).schemas || {});
}

const swagger = () => SwaggerUIBundle({ url: "/openapi.json", dom_id: "#api", deepLinking: true, persistAuthorization: false, validatorUrl: null, presets: [SwaggerUIBundle.presets.apis], layout: "BaseLayout" });
if (document.querySelector(".plain")) list();
else Promise.all([load("script", { src: "/static/swagger-ui-bundle.js" }), load("link", { rel: "stylesheet", href: "/static/swagger-ui.css" })]).then(swagger);
