"use strict";
// The page talks to the same API as everybody else: /v1/jobs, /v1/events, /v1/models.
const $ = (id) => document.getElementById(id);
const ENDED = ["succeeded", "failed", "canceled", "expired"];
const KINDS = ["queued", "started", "progress", "preview", "stage", "retry", "crashed", "rolled_back", "heartbeat", ...ENDED];
const ASKABLE = ["prompt", "negative_prompt", "model", "num_frames", "height", "width", "num_inference_steps", "guidance_scale", "seed", "fps", "cache", "adapter", "adapter_scale", "image", "score"];
const IDEAS = {
  shapes: ["a red circle moving right on a white background", "a yellow star growing on a navy background", "a green triangle moving up on a black background", "a blue square moving left on a grey background",
    "a blue star moving down on a white background", "a red triangle growing on a black background", "a yellow circle moving up on a navy background", "a green square moving right on a white background"],
  any: ["a paper boat drifting down a rainy street", "a fox asleep in falling snow, close up", "steam rising from a cup of tea in morning light", "a lighthouse in a storm, waves breaking",
    "ink spreading in clear water", "a kite over a summer field", "fireflies above a pond at dusk", "a small robot watering a plant"],
};
const BEGIN = { "now-prompt": $("now-prompt").textContent, message: $("message").textContent, facts: "" };
const jobs = new Map();        // id -> job, as the API gives it
const cursors = new Map();     // id -> number of the last event seen
const stills = new Map();      // id -> address of its first frame
let shown = null, next = null, stream = null, models = {}, clip = "", key = sessionStorage.getItem("key") || "";

class Refused extends Error { constructor(status, problem) { super(problem.detail || (problem.error && problem.error.message) || `the service answered with ${status}`); this.status = status; } }

async function get(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) } })
    .catch(() => { throw new Error("the service does not answer; what it accepted is safe"); });
  if (answer.ok) return answer;
  if (answer.status === 401) askKey();
  throw new Refused(answer.status, await answer.json().catch(() => ({})));
}

async function call(path, options) {
  const answer = await get(path, options);
  return answer.status === 204 ? null : answer.json();
}

// For what can't send a header: a minute of reading one path, or the bytes themselves.
async function opened(path) { return key ? (await call(`/v1/tickets?path=${encodeURIComponent(path)}`, { method: "POST" })).url : path; }
async function kept(path) { return key ? URL.createObjectURL(await (await get(path)).blob()) : path; }

function tell(err) { $("error").textContent = err ? err.message : ""; $("error").hidden = !err; }
const boldly = (act) => async (...given) => { try { return await act(...given); } catch (err) { tell(err); } };
const say = (text) => { $("said").textContent = text; };

// asking

function asked() {
  const form = new FormData($("ask")), spec = { prompt: form.get("prompt").trim() };
  if (!spec.prompt) throw new Error("the prompt is empty: say what should be seen, or press Surprise me");
  for (const name of ["num_frames", "num_inference_steps", "guidance_scale", "seed", "fps"]) if (form.get(name)) spec[name] = Number(form.get(name));
  for (const name of ["model", "negative_prompt"]) if (form.get(name)) spec[name] = form.get(name);
  return spec;
}

async function picture() {
  if (!$("image").files.length) { $("image").focus(); throw new Error("this model begins with a picture: choose a first frame"); }
  const body = new FormData();
  body.append("image", $("image").files[0]);
  return (await call("/v1/uploads", { method: "POST", body })).id;
}

function post(path, body) {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random()}` };
  return call(path, { method: "POST", headers, body: JSON.stringify(body) });
}

async function clipOf(spec) {
  if (models[spec.model] && models[spec.model].task === "i2v" && !spec.image) spec.image = await picture();
  return post("/v1/jobs", { spec });
}

async function accepted(asking) {
  tell(null);
  $("go").disabled = true;
  try {
    const job = await asking();
    jobs.set(job.id, job);
    show(job.id);
    say("accepted");
    $("now").scrollIntoView({ block: "nearest", behavior: "smooth" });
    follow();
  } catch (err) {
    tell(err);
    $("prompt").focus();
  } finally {
    $("go").disabled = false;
  }
}

// following: one stream for all jobs that are not finished

async function follow() {
  if (stream) stream.close();
  const mine = stream = { close() { this.source && this.source.close(); } };
  const active = [...jobs.values()].filter((j) => !ENDED.includes(j.state)).map((j) => j.id).slice(0, 50);
  if (!active.length) return;
  const again = () => setTimeout(() => mine === stream && follow(), 2000);
  try {
    const url = new URL(await opened("/v1/events"), location.href);
    if (mine !== stream) return;
    url.searchParams.set("jobs", active.join(","));
    url.searchParams.set("after", active.map((id) => cursors.get(id) || 0).join(","));
    const source = mine.source = new EventSource(url);
    for (const kind of KINDS) source.addEventListener(kind, boldly((message) => heard(JSON.parse(message.data))));
    source.onerror = () => { if (source.readyState === EventSource.CLOSED) again(); };
  } catch { again(); }
}

async function heard(event) {
  const job = jobs.get(event.job);
  if (!job || event.seq <= (cursors.get(event.job) || 0)) return;
  cursors.set(event.job, event.seq);
  if (event.type === "started") job.state = "running";
  if (event.type === "retry" || event.type === "crashed") job.state = "queued";
  if (event.type === "preview") job.preview = event.data.artifact;
  else for (const field of ["stage", "progress", "message", "step", "steps"]) if (event.data[field] !== undefined) job[field] = event.data[field];
  if (ENDED.includes(event.type)) {
    Object.assign(job, await call(`/v1/jobs/${job.id}`), { preview: job.preview });
    if (shown === job.id) { job.fresh = true; say(words(job)); }
  }
  draw(job.id);
}

// showing

function words(job) {
  if (job.state === "failed") return `failed: ${job.error ? job.error.message : "nobody knows why"}`;
  if (job.state === "running") return [job.cancel_requested ? "stopping" : job.message || job.stage || "running", job.steps && `step ${job.step} of ${job.steps}`, `${Math.round(job.progress)} %`].filter(Boolean).join(" · ");
  return { queued: "waiting for its turn", succeeded: "finished", canceled: "canceled", expired: "waited too long" }[job.state];
}

function made(tag, name, text) {
  const part = document.createElement(tag);
  if (name) part.className = name;
  if (text) part.textContent = text;
  return part;
}

function row(job) {
  const item = made("li", job.state), button = made("button"), still = made("span", "still");
  item.id = job.id;
  button.type = "button";
  still.setAttribute("aria-hidden", "true");
  if (stills.get(job.id)) still.style.backgroundImage = `url("${stills.get(job.id)}")`;
  button.append(still, made("span", "prompt", job.spec.prompt || job.kind), made("span", "state", words(job)));
  button.setAttribute("aria-current", String(job.id === shown));
  button.onclick = () => show(job.id);
  item.append(button);
  return item;
}

function draw(id) {
  const job = jobs.get(id), old = $(id), fresh = row(job);
  if (old) { const focused = old.contains(document.activeElement); old.replaceWith(fresh); if (focused) fresh.firstChild.focus(); }
  else $("history").insertBefore(fresh, [...$("history").children].find((other) => other.id < id) || null);
  $("empty").hidden = jobs.size > 0;
  if (job.state === "succeeded" && job.links.video && !stills.has(id)) still(id);
  if (id === shown) detail(job).catch(tell);
}

async function still(id) {
  stills.set(id, "");
  try {
    stills.set(id, await kept(`/v1/videos/${id}/content?variant=thumbnail`));
    const place = $(id) && $(id).querySelector(".still");
    if (place) place.style.backgroundImage = `url("${stills.get(id)}")`;
  } catch { /* a film whose time is over has none */ }
}

function show(id) {
  const before = shown;
  shown = id;
  if (before && before !== id && jobs.has(before)) draw(before);
  $("player").hidden = $("preview").hidden = true;
  $("player").removeAttribute("src");
  $("preview").dataset.of = "";
  jobs.get(id).fresh = true;
  draw(id);
}

async function detail(job) {
  const over = ENDED.includes(job.state), video = over && job.links.video, r = job.result;
  $("stage").className = `stage ${over ? job.state : "works"}`;
  $("now-prompt").textContent = job.spec.prompt || job.kind;
  $("message").textContent = words(job);
  $("bar").value = job.progress;
  $("bar").hidden = over;
  $("cancel").hidden = over;
  $("cancel").disabled = job.cancel_requested;
  $("download").hidden = !video;
  for (const name of ["again", "reuse", "forget"]) $(name).hidden = !over;
  if (job.spec.extends) $("again").hidden = true;  // it takes the film before it, which only a new continuation names
  $("goon").hidden = !video || !models[job.model.split("+")[0]] || !Object.values(models).some((m) => m.task === "i2v" && m.ready);
  $("forget").textContent = "Forget";
  document.title = over ? `${job.state === "succeeded" ? "✓" : "✗"} vidgen` : `${Math.round(job.progress)} % · vidgen`;
  $("facts").textContent = r ? [`seed ${r.seed}`, r.model, `${r.frames} frames`, r.fps && `${r.fps} per second`, r.seconds && `made in ${Number(r.seconds).toFixed(1)} s`, ...(r.warnings || [])].filter(Boolean).join(" · ") : "";
  if (!over && job.preview && $("preview").dataset.of !== job.preview) await develop(job);
  if (over && !video) $("preview").hidden = true;
  if (video && job.fresh) { job.fresh = false; await play(job); }
}

async function develop(job) {
  $("preview").dataset.of = job.preview;
  const url = await kept(`/v1/jobs/${job.id}/artifacts/${encodeURIComponent(job.preview)}`);
  if (shown !== job.id || ENDED.includes(job.state)) return;
  $("preview").onload = ({ target: strip }) => {  // it holds frames side by side: they are shown one after the other
    const known = { ...models[job.spec.model], ...job.spec }, ratio = known.width / known.height || strip.naturalWidth / strip.naturalHeight;
    const cells = Math.max(1, Math.round(strip.naturalWidth / strip.naturalHeight / ratio));
    strip.style.setProperty("--ratio", ratio);
    strip.style.setProperty("--cells", Math.max(2, cells));
    strip.classList.toggle("reel", cells > 1);
  };
  $("preview").src = url;
  $("preview").hidden = false;
}

async function play(job) {
  const url = await kept(job.links.video);
  if (shown !== job.id) return;
  if (clip.startsWith("blob:")) URL.revokeObjectURL(clip);
  clip = url;
  $("preview").hidden = true;
  $("player").src = url;
  $("player").hidden = false;
  $("download").href = url;
  $("download").download = `${job.id}.mp4`;
  $("player").play().catch(() => {});
}

// doing

const cancel = boldly(async () => {
  const job = jobs.get(shown);
  if (!job || ENDED.includes(job.state)) return;
  Object.assign(job, await call(`/v1/jobs/${job.id}/cancel`, { method: "POST" }));
  say(words(job));
  draw(job.id);
});

// What this page can say of a job; a number of frames that was cut to is not one every model makes.
const spoken = (job) => Object.fromEntries(ASKABLE.filter((name) => job.spec[name] !== undefined && !(name === "num_frames" && job.spec.trim)).map((name) => [name, job.spec[name]]));

function again() {
  const job = jobs.get(shown);
  if (job && !$("again").hidden) accepted(() => clipOf({ ...spoken(job), seed: ((job.result || {}).seed ?? job.spec.seed ?? 0) + 1 }));
}

function goon() {  // with the prompt that stands in the form, if there is one
  const job = jobs.get(shown), usual = models[job.model.split("+")[0]], prompt = $("prompt").value.trim() || job.spec.prompt;
  accepted(async () => {
    const video = await post("/v1/videos/extensions", { prompt, seconds: ((usual.num_frames - 1) / usual.fps).toFixed(3), video: { id: job.id } });
    return call(`/v1/jobs/${video.id}`);
  });
}

function reuse() {
  const { spec } = jobs.get(shown), form = $("ask");
  if (models[spec.model]) { $("model").value = spec.model; chosen(); }
  for (const name of ["prompt", "negative_prompt", "num_frames", "num_inference_steps", "guidance_scale", "seed", "fps"]) if (spec[name] !== undefined) form.elements[name].value = spec[name];
  $("prompt").focus();
  $("prompt").select();
}

const forget = boldly(async () => {
  const id = shown, neighbour = $(id).nextElementSibling || $(id).previousElementSibling;
  if ($("forget").textContent === "Forget") { $("forget").textContent = "Forget for good?"; return; }
  await call(`/v1/jobs/${id}`, { method: "DELETE" });
  jobs.delete(id);
  $(id).remove();
  say("forgotten");
  shown = null;
  if (neighbour) { show(neighbour.id); $(neighbour.id).firstChild.focus(); } else rest();
});

function rest() {  // as the page begins
  for (const [name, text] of Object.entries(BEGIN)) $(name).textContent = text;
  for (const name of ["player", "preview", "bar", "cancel", "download", "again", "goon", "reuse", "forget"]) $(name).hidden = true;
  $("player").removeAttribute("src");
  $("stage").className = "stage";
  $("empty").hidden = false;
  document.title = "vidgen";
  $("prompt").focus();
}

function surprise() {
  const list = IDEAS[$("model").value.startsWith("shapes") ? "shapes" : "any"].filter((text) => text !== $("prompt").value);
  $("prompt").value = list[Math.floor(Math.random() * list.length)];
  $("prompt").focus();
}

// beginning

const earlier = boldly(async () => {
  const page = await call(`/v1/jobs?limit=20${next ? `&cursor=${next}` : ""}`);
  for (const job of page.data) { if (!jobs.has(job.id)) jobs.set(job.id, job); draw(job.id); }
  next = page.next;
  $("more").hidden = !next;
});

async function options() {
  const found = await call("/v1/models"), chosenBefore = $("model").value;
  models = Object.fromEntries(found.data.map((m) => [m.id, m]));
  const usual = chosenBefore || found.default;
  $("model").replaceChildren(...found.data.filter((m) => m.ready).map((m) => new Option(`${m.id}${m.task === "i2v" ? " · begins with a picture" : ""}`, m.id, m.id === usual, m.id === usual)));
  chosen();
}

function chosen() {
  const model = models[$("model").value];
  if (!model) return;
  $("num_frames").replaceChildren(...model.frames.map((n) => new Option(`${n} (${(n / model.fps).toFixed(1)} s)`, n, n === model.num_frames, n === model.num_frames)));
  for (const name of ["num_inference_steps", "guidance_scale", "fps"]) $("ask").elements[name].placeholder = model[name];
  $("image-row").hidden = model.task !== "i2v";
}

async function health() {
  if (document.hidden) return;
  try {
    const h = await (await fetch("/health")).json();
    $("health").textContent = [h.status, `${h.active_jobs} running`, `${h.queue_depth} waiting`, `${h.completed_jobs} finished`].join(" · ");
    $("health").className = h.status === "ok" ? "up" : "down";
  } catch { $("health").textContent = "the service does not answer; what it accepted is safe"; $("health").className = "down"; }
}

function step(by) {
  const buttons = [...document.querySelectorAll("#history button")], at = buttons.indexOf(document.activeElement);
  const to = buttons[Math.max(0, Math.min(buttons.length - 1, at + by))];
  if (to) to.focus();
}

function askKey() { if (!$("key-dialog").open) { $("key-dialog").returnValue = ""; $("key-dialog").showModal(); } }

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); return $("ask").requestSubmit(); }
  if (/INPUT|TEXTAREA|SELECT/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey || $("key-dialog").open) { if (event.key === "Escape") event.target.blur(); return; }
  const does = { n: () => $("prompt").focus(), j: () => step(1), k: () => step(-1), a: again, c: cancel, d: () => !$("download").hidden && $("download").click() };
  if (event.key === " " && !/BUTTON|A|SUMMARY|VIDEO/.test(event.target.tagName) && !$("player").hidden) { event.preventDefault(); return $("player").paused ? $("player").play() : $("player").pause(); }
  if (does[event.key]) { event.preventDefault(); does[event.key](); }
});

$("ask").onsubmit = (event) => { event.preventDefault(); boldly(() => { const spec = asked(); accepted(() => clipOf(spec)); })(); };
for (const [name, act] of Object.entries({ cancel, again, goon, reuse, forget, surprise, more: earlier, "key-button": askKey })) $(name).onclick = act;
$("model").onchange = chosen;
$("key-dialog").onclose = () => { if ($("key-dialog").returnValue !== "ok") return; key = $("key").value.trim(); sessionStorage.setItem("key", key); begin(); };

async function begin() {
  tell(null);
  health();
  try { await options(); await earlier(); follow(); } catch (err) { tell(err); }
}
begin();
setInterval(health, 5000);
document.addEventListener("visibilitychange", health);
