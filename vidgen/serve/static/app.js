"use strict";
// The page talks to the same API as everybody else: /v1/jobs, /v1/events, /v1/models.
const $ = (id) => document.getElementById(id);
const ENDED = ["succeeded", "failed", "canceled", "expired"];
const KINDS = ["queued", "started", "progress", "preview", "stage", "retry", "crashed", "rolled_back", "heartbeat", ...ENDED];
const jobs = new Map();        // id -> job, as the API gives it
const cursors = new Map();     // id -> number of the last event seen
let shown = null, next = null, stream = null, models = {}, key = sessionStorage.getItem("key") || "";

class Refused extends Error { constructor(status, problem) { super(problem.detail || `the service answered with ${status}`); this.status = status; } }

async function call(path, options = {}) {
  const headers = { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  if (answer.status === 401) $("key-dialog").showModal();
  throw new Refused(answer.status, await answer.json().catch(() => ({})));
}

// For what can't send a header: a minute of reading one path.
async function opened(path) {
  if (!key) return path;
  return (await call(`/v1/tickets?path=${encodeURIComponent(path)}`, { method: "POST" })).url;
}

// asking

function asked() {
  const form = new FormData($("ask")), spec = { prompt: form.get("prompt").trim() };
  for (const name of ["num_frames", "num_inference_steps", "guidance_scale", "seed", "fps"]) if (form.get(name)) spec[name] = Number(form.get(name));
  for (const name of ["model", "negative_prompt"]) if (form.get(name)) spec[name] = form.get(name);
  return spec;
}

async function ask(spec) {
  $("error").hidden = true;
  $("go").disabled = true;
  try {
    if (models[spec.model] && models[spec.model].task === "i2v" && !spec.image) {
      if (!$("image").files.length) throw new Error("this model begins with a picture: choose a first frame");
      const body = new FormData();
      body.append("image", $("image").files[0]);
      spec.image = (await call("/v1/uploads", { method: "POST", body })).id;
    }
    const headers = { "Content-Type": "application/json", "Idempotency-Key": crypto.randomUUID ? crypto.randomUUID() : String(Math.random()) };
    const job = await call("/v1/jobs", { method: "POST", headers, body: JSON.stringify({ spec }) });
    jobs.set(job.id, job);
    show(job.id);
    follow();
  } catch (err) {
    $("error").textContent = err.message;
    $("error").hidden = false;
  } finally {
    $("go").disabled = false;
  }
}

// following: one stream for all jobs that are not finished

async function follow() {
  if (stream) stream.close();
  const active = [...jobs.values()].filter((j) => !ENDED.includes(j.state)).map((j) => j.id).slice(0, 50);
  if (!active.length) return;
  const url = new URL(await opened("/v1/events"), location.href);
  url.searchParams.set("jobs", active.join(","));
  url.searchParams.set("after", active.map((id) => cursors.get(id) || 0).join(","));
  const mine = stream = new EventSource(url);
  for (const kind of KINDS) mine.addEventListener(kind, (message) => heard(JSON.parse(message.data)));
  mine.onerror = () => { if (mine === stream && mine.readyState === EventSource.CLOSED) setTimeout(() => mine === stream && follow(), 2000); };
}

async function heard(event) {
  const job = jobs.get(event.job);
  if (!job || event.seq <= (cursors.get(event.job) || 0)) return;
  cursors.set(event.job, event.seq);
  if (event.type === "started") job.state = "running";
  if (event.type === "retry" || event.type === "crashed") job.state = "queued";
  for (const field of ["stage", "progress", "message"]) if (event.data[field] !== undefined) job[field] = event.data[field];
  if (event.type === "preview") job.preview = event.data.artifact;
  if (ENDED.includes(event.type)) { Object.assign(job, await call(`/v1/jobs/${job.id}`), { preview: job.preview }); if (shown === job.id) job.fresh = true; }
  draw(job.id);
}

// showing

function words(job) {
  if (job.state === "failed") return `failed: ${job.error ? job.error.message : "nobody knows why"}`;
  if (job.state === "running") return [job.cancel_requested ? "stopping" : job.stage || "running", `${Math.round(job.progress)} %`, job.message].filter(Boolean).join(" · ");
  return { queued: "waiting for its turn", succeeded: "finished", canceled: "canceled", expired: "waited too long" }[job.state];
}

function row(job) {
  const item = document.createElement("li"), button = document.createElement("button"), text = document.createElement("span"), state = document.createElement("span");
  item.id = job.id;
  item.className = job.state;
  button.type = "button";
  text.textContent = job.spec.prompt || job.kind;
  state.className = "state";
  state.textContent = words(job);
  button.append(text, state);
  button.setAttribute("aria-current", String(job.id === shown));
  button.onclick = () => show(job.id);
  item.append(button);
  return item;
}

function draw(id) {
  const job = jobs.get(id), old = $(id), made = row(job);
  if (old) { const focused = old.contains(document.activeElement); old.replaceWith(made); if (focused) made.firstChild.focus(); }
  else {
    const before = [...$("history").children].find((other) => other.id < id);
    $("history").insertBefore(made, before || null);
  }
  if (id === shown) detail(job);
}

async function show(id) {
  const before = shown;
  shown = id;
  if (before && before !== id && jobs.has(before)) draw(before);
  $("player").hidden = $("preview").hidden = true;
  $("player").removeAttribute("src");
  jobs.get(id).fresh = true;
  draw(id);
}

async function detail(job) {
  $("now").hidden = false;
  $("now-prompt").textContent = job.spec.prompt || job.kind;
  $("bar").value = job.state === "succeeded" ? 100 : job.progress;
  $("message").textContent = words(job);
  $("cancel").hidden = ENDED.includes(job.state);
  $("again").hidden = !ENDED.includes(job.state);
  $("download").hidden = !(job.links && job.links.video);
  const r = job.result;
  $("facts").textContent = r ? [`seed ${r.seed}`, r.model, `${r.frames} frames`, r.fps && `${r.fps} per second`, r.seconds && `${Number(r.seconds).toFixed(1)} s`, ...(r.warnings || [])].filter(Boolean).join(" · ") : "";
  if (job.state !== "succeeded" && job.preview && $("preview").dataset.of !== job.preview) await picture(job);
  if (job.links && job.links.video && job.fresh) { job.fresh = false; await play(job); }
}

async function picture(job) {
  $("preview").dataset.of = job.preview;
  $("preview").src = await opened(`/v1/jobs/${job.id}/artifacts/${encodeURIComponent(job.preview)}`);
  $("preview").hidden = shown !== job.id;
}

async function film(job) {  // with a key as a blob: a ticket would end while one looks
  if (!key) return job.links.video;
  const answer = await fetch(job.links.video, { headers: { Authorization: `Bearer ${key}` } });
  if (!answer.ok) throw new Refused(answer.status, await answer.json().catch(() => ({})));
  return URL.createObjectURL(await answer.blob());
}

async function play(job) {
  const url = await film(job).catch((err) => { $("message").textContent = err.message; return null; });
  if (!url || shown !== job.id) return;
  $("preview").hidden = true;
  $("player").src = url;
  $("player").hidden = false;
  $("download").href = url;
  $("download").download = `${job.id}.mp4`;
  $("player").play().catch(() => {});
}

async function cancel() {
  const job = jobs.get(shown);
  if (!job || ENDED.includes(job.state)) return;
  Object.assign(job, await call(`/v1/jobs/${job.id}/cancel`, { method: "POST" }));
  draw(job.id);
}

// beginning

async function history() {
  const page = await call(`/v1/jobs?limit=20${next ? `&cursor=${next}` : ""}`);
  for (const job of page.data) { if (!jobs.has(job.id)) jobs.set(job.id, job); draw(job.id); }
  next = page.next;
  $("more").hidden = !next;
}

async function options() {
  const found = await call("/v1/models");
  models = Object.fromEntries(found.data.map((m) => [m.id, m]));
  $("model").replaceChildren(...found.data.filter((m) => m.ready).map((m) => new Option(`${m.id} (${m.task})`, m.id, m.id === found.default, m.id === found.default)));
  chosen();
}

function chosen() {
  const model = models[$("model").value];
  if (!model) return;
  $("num_frames").replaceChildren(...model.frames.map((n) => new Option(`${n} (${(n / model.fps).toFixed(1)} s)`, n, n === model.num_frames, n === model.num_frames)));
  $("ask").num_inference_steps.placeholder = model.num_inference_steps;
  $("ask").guidance_scale.placeholder = model.guidance_scale;
  $("ask").fps.placeholder = model.fps;
  $("image-row").hidden = model.task !== "i2v";
}

async function health() {
  try {
    const h = await (await fetch("/health")).json();
    $("health").textContent = `${h.status} · ${h.active_jobs} running · ${h.queue_depth} waiting · ${h.completed_jobs} finished`;
  } catch { $("health").textContent = "the service does not answer; what it accepted is safe"; }
}

function step(by) {
  const buttons = [...document.querySelectorAll("#history button")], at = buttons.indexOf(document.activeElement);
  const to = buttons[Math.max(0, Math.min(buttons.length - 1, at + by))];
  if (to) to.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); return $("ask").requestSubmit(); }
  if (/INPUT|TEXTAREA|SELECT/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey || $("key-dialog").open) { if (event.key === "Escape") event.target.blur(); return; }
  const does = { n: () => $("prompt").focus(), j: () => step(1), k: () => step(-1), c: cancel, d: () => !$("download").hidden && $("download").click() };
  if (event.key === " " && event.target.tagName !== "BUTTON" && !$("player").hidden) { event.preventDefault(); return $("player").paused ? $("player").play() : $("player").pause(); }
  if (does[event.key]) { event.preventDefault(); does[event.key](); }
});

$("ask").onsubmit = (event) => { event.preventDefault(); ask(asked()); };
$("cancel").onclick = cancel;
$("again").onclick = () => { const spec = { ...jobs.get(shown).spec }; spec.seed = ((jobs.get(shown).result || {}).seed ?? spec.seed ?? 0) + 1; ask(spec); };
$("more").onclick = history;
$("model").onchange = chosen;
$("key-button").onclick = () => $("key-dialog").showModal();
$("key-dialog").onclose = () => { key = $("key").value.trim(); sessionStorage.setItem("key", key); begin(); };

async function begin() {
  health();
  try { await options(); await history(); follow(); } catch (err) { $("error").textContent = err.message; $("error").hidden = false; }
}
begin();
setInterval(health, 5000);
