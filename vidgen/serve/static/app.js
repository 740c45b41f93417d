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
const DOING = { text: "reading the prompt", image: "looking at the first frame", denoise: "making", decode: "turning it into frames" };
const BEGIN = { "now-prompt": $("now-prompt").textContent, message: $("message").textContent, facts: "" };
const jobs = new Map();        // id -> job, as the API gives it
const cursors = new Map();     // id -> number of the last event seen
const stills = new Map();      // id -> address of its first frame
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let shown = null, next = null, stream = null, models = {}, clip = "", key = sessionStorage.getItem("key") || "";
let busy = false, follows = null, lent = "";  // a request is on its way; the continued clip, or the first frame, that the form asks for again

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
async function film(path) {  // {url, name}: without a key the service names what is downloaded, else its answer says how
  if (!key) return { url: path, name: "" };
  const answer = await get(path), [, name = ""] = /filename\*?="?(?:utf-8'')?([^";]+)/i.exec(answer.headers.get("Content-Disposition")) || [];
  return { url: URL.createObjectURL(await answer.blob()), name: decodeURIComponent(name) };
}

function tell(err) {
  $("error").textContent = err ? err.message : "";
  $("error").hidden = !err;
  if (err) $("error").scrollIntoView({ block: "nearest" });
}

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
  if (!$("image").files.length && lent) return lent;
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

// A video of /v1/videos/extensions is a job like any other. `seconds` are what comes to the clip.
async function goes(video, prompt, seconds, more = {}) {
  const made = await post("/v1/videos/extensions", { prompt, seconds: seconds.toFixed(3), video: { id: video }, ...more })
    .catch((err) => { throw err.status === 404 ? new Error("the clip that this one continues is gone, so it can't be continued once more") : err; });
  return call(`/v1/jobs/${made.id}`);
}

async function accepted(asking) {
  if (busy) return;
  tell(null);
  busy = true;
  $("go").setAttribute("aria-disabled", "true");
  try {
    const job = await asking();
    jobs.set(job.id, job);
    show(job.id);
    say("accepted");
    $("now").scrollIntoView({ block: "nearest", behavior: calm.matches ? "auto" : "smooth" });
    follow();
  } catch (err) {
    tell(err);
    $("prompt").focus();
  } finally {
    busy = false;
    $("go").removeAttribute("aria-disabled");
  }
}

// following: one stream for all jobs that are not finished

async function follow() {
  if (stream) stream.close();
  const mine = stream = { close() { this.source && this.source.close(); } };
  const active = [...jobs.values()].filter((j) => !ENDED.includes(j.state)).map((j) => j.id).slice(0, 50);
  if (!active.length) return;
  const again = () => setTimeout(async () => { if (mine === stream) { await Promise.all(active.map(look)); if (mine === stream) follow(); } }, 2000);
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

async function look(id) {  // how a job stands that its events don't tell of any more
  try {
    const job = Object.assign(jobs.get(id), await call(`/v1/jobs/${id}`));
    job.fresh = ENDED.includes(job.state);
    draw(id);
  } catch (err) { if (err.status === 404) drop(id); }
}

async function heard(event) {
  const job = jobs.get(event.job), { type, data } = event;
  if (!job || event.seq <= (cursors.get(event.job) || 0)) return;
  cursors.set(event.job, event.seq);
  if (type === "started") job.state = "running";
  if (type === "retry" || type === "crashed") Object.assign(job, { state: "queued", retried: true, since: null, due: 0 });
  if (type === "preview") job.preview = data.artifact;
  else for (const field of ["stage", "progress", "message", "step", "steps"]) if (data[field] !== undefined) job[field] = data[field];
  if (type === "progress") reckon(job, event);
  if (ENDED.includes(type)) {
    Object.assign(job, await call(`/v1/jobs/${job.id}`), { preview: job.preview });
    if (shown === job.id) { job.fresh = true; say(words(job)); }
    health();
  } else if (shown === job.id) hear(job, type);
  draw(job.id);
}

function hear(job, type) {  // now and then, for those who don't see the bar
  const quarter = Math.floor(job.progress / 25);
  if (type === "started" || (type === "progress" && quarter > (job.quarter || 0))) say([type === "started" ? "started" : `${Math.round(job.progress)} %`, left(job)].filter(Boolean).join(", "));
  if (type === "progress") job.quarter = quarter;
}

function reckon(job, { ts, data: { message, progress, steps } }) {  // by what the steps so far took
  if (!(steps > 1)) return;
  if (!job.since || job.since.message !== message) job.since = { ts, progress, message };
  const gained = progress - job.since.progress;
  if (gained > 0) job.due = Date.now() + 1000 * (ts - job.since.ts) * (100 - progress) / gained;
}

// showing

function left(job) {
  const seconds = ((job.due || 0) - Date.now()) / 1000;
  if (job.state !== "running" || job.cancel_requested || seconds < 1) return "";
  return seconds < 10 ? "a few seconds left" : seconds < 90 ? `about ${Math.ceil(seconds / 5) * 5} s left` : `about ${Math.round(seconds / 60)} min left`;
}

function doing(job) {
  if (job.cancel_requested) return "stopping";
  if (job.message === "decode" && job.steps && job.step === job.steps) return "writing the file";
  const text = DOING[job.message] || job.message || "starting";
  return job.message in DOING && job.steps > 1 ? `${text}, step ${job.step} of ${job.steps}` : text;
}

function words(job) {
  if (job.state === "failed") return `failed: ${job.error ? job.error.message : "the service does not know why"}`;
  if (job.state === "running") return [doing(job), left(job)].filter(Boolean).join(" · ");
  return { queued: job.retried || job.attempt ? "queued for another try" : "queued", succeeded: job.trouble || "finished", canceled: "canceled", expired: "not begun in time" }[job.state];
}

function when(seconds) {
  const then = new Date(1000 * seconds), today = then.toDateString() === new Date().toDateString();
  return then.toLocaleString([], today ? { timeStyle: "short" } : { dateStyle: "short", timeStyle: "short" }).replaceAll(" ", "\u00a0");
}

// What tells a clip from others of the same prompt.
const apart = (job) => [job.spec.extends && "continued", words(job), job.result && job.result.seed !== undefined && `seed ${job.result.seed}`, job.finished_at && when(job.finished_at)].filter(Boolean).join(" · ");
const lasts = (job) => (job.result && job.result.duration ? `${Number(job.result.duration).toFixed(1)}\u00a0s` : "");

function made(tag, name, text) {
  const part = document.createElement(tag);
  if (name) part.className = name;
  if (text) part.textContent = text;
  return part;
}

function row(id) {  // made once and then only written to: what is pressed must not be exchanged meanwhile
  const item = made("li"), button = made("button"), still = made("span", "still");
  item.id = id;
  button.type = "button";
  button.onclick = () => show(id);
  still.append(made("span", "length"));
  button.append(still, made("span", "prompt"), made("span", "state"));
  item.append(button);
  $("history").insertBefore(item, [...$("history").children].find((other) => other.id < id) || null);
  return item;
}

function draw(id) {
  const job = jobs.get(id), item = $(id) || row(id), put = (name, text) => { const part = item.querySelector(`.${name}`); if (part.textContent !== text) part.textContent = text; };
  item.className = `${job.state}${job.spec.extends ? " continued" : ""}`;
  item.firstChild.setAttribute("aria-current", String(id === shown));
  put("length", lasts(job));
  put("prompt", job.spec.prompt || job.kind);
  put("state", apart(job));
  $("empty").hidden = true;
  if (job.state === "succeeded" && job.links.video && !stills.has(id)) still(id);
  if (id === shown) detail(job).catch(tell);
}

function drop(id) {  // it is no more
  jobs.delete(id);
  if ($(id)) $(id).remove();
  if (shown === id) { shown = null; rest(); }
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
  $("forget").textContent = "Delete";
  // until this film is here, Download must not give the former one
  $("download").removeAttribute("href");
  if (before && before !== id && jobs.has(before)) draw(before);
  $("player").hidden = $("preview").hidden = true;
  $("player").removeAttribute("src");
  $("preview").dataset.of = "";
  jobs.get(id).fresh = true;
  draw(id);
}

async function detail(job) {
  const over = ENDED.includes(job.state), good = job.state === "succeeded", video = over && job.links.video && !job.trouble, held = document.activeElement;
  $("stage").className = `stage ${over ? job.state : "works"}`;
  $("now-prompt").textContent = job.spec.prompt || job.kind;
  $("message").textContent = words(job);
  $("bar").value = job.progress;
  $("bar").hidden = over;
  $("cancel").hidden = over;
  $("cancel").setAttribute("aria-disabled", String(job.cancel_requested));
  $("download").hidden = !video;
  for (const name of ["again", "reuse", "forget"]) $(name).hidden = !over;
  if (good && job.spec.extends && !job.spec.extends.video) $("again").hidden = $("reuse").hidden = true;  // nobody wrote down what it continues
  $("again").textContent = good ? "Another take" : "Try again";
  $("goon").hidden = !video || !models[job.model.split("+")[0]] || !Object.values(models).some((m) => m.task === "i2v" && m.ready);
  $("before").hidden = !job.spec.extends;
  $("first").hidden = !(job.spec.extends || {}).video;
  document.title = over ? `${good ? "✓" : "✗"} vidgen` : `${Math.round(job.progress)} % · vidgen`;
  $("facts").textContent = facts(job);
  if ($("doings").contains(held) && !held.offsetParent) $("now-prompt").focus();  // its button is gone
  if (!over && job.preview && $("preview").dataset.of !== job.preview) await develop(job);
  if (over && !video) $("preview").hidden = true;
  if (video && job.fresh) { job.fresh = false; await play(job); }
}

function facts({ result: r }) {
  if (!r) return "";
  return [lasts({ result: r }), `${r.frames} frames${r.fps ? `, ${r.fps} per second` : ""}`, r.width && `${r.width}\u00a0×\u00a0${r.height}`, `seed ${r.seed}`, r.model, r.seconds && `made in ${Number(r.seconds).toFixed(1)}\u00a0s`, ...(r.warnings || [])].filter(Boolean).join(" · ");
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
  let found;
  try { found = await film(job.links.video); } catch (err) { return missed(job, err.message); }
  if (shown !== job.id) return;
  if (clip.startsWith("blob:")) URL.revokeObjectURL(clip);
  clip = found.url;
  $("preview").hidden = true;
  $("player").src = clip;
  $("player").hidden = false;
  $("player").setAttribute("aria-label", job.spec.prompt || job.kind);
  $("download").href = key ? clip : job.links.download;
  $("download").download = found.name;
  if (!calm.matches) $("player").play().catch(() => {});
}

function missed(job, why) {  // a film that can't be shown, and why
  job.trouble = why;
  if (shown === job.id) $("player").hidden = true;
  draw(job.id);
}

async function unplayed() {
  const job = jobs.get(shown);
  if (!job || !$("player").hasAttribute("src")) return;
  try {
    await get(job.links.video, { headers: { Range: "bytes=0-0" } });
    $("message").textContent = "this browser can't play the film; Download keeps it";
  } catch (err) { missed(job, err.message); }
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

function again() {  // what went well with another seed, what did not as it was
  const job = jobs.get(shown);
  if (!job || $("again").hidden) return;
  const seed = (((job.result || {}).seed ?? job.spec.seed ?? 0) + 1) % 2 ** 32;
  if (job.state !== "succeeded") accepted(() => post(`/v1/jobs/${job.id}/retry`));
  else accepted(() => (job.spec.extends ? anew(job.spec, job.spec.prompt, { seed }) : clipOf({ ...spoken(job), seed })));
}

const anew = (spec, prompt, more) => goes(spec.extends.video, prompt, (spec.num_frames - 1) / spec.fps, more);

function goon() {  // with the prompt that stands in the form, if there is one
  const job = jobs.get(shown), usual = models[job.model.split("+")[0]];
  accepted(() => goes(job.id, $("prompt").value.trim() || job.spec.prompt, (usual.num_frames - 1) / (job.result.fps || usual.fps)));
}

function write(text) {  // as if typed, so that what stood there comes back by undoing
  $("prompt").focus();
  $("prompt").select();
  if ($("prompt").value !== text && !document.execCommand("insertText", false, text)) $("prompt").value = text;
}

function afresh(spec = {}) {  // what the form asks for beside its fields
  follows = spec.extends ? spec : null;
  lent = follows ? "" : spec.image || "";
  $("follows").hidden = !follows;
  $("options").hidden = Boolean(follows);
  $("lent").hidden = !lent;
  chosen();
}

function reuse() {
  const { spec } = jobs.get(shown), form = $("ask");
  if (models[spec.model] && !spec.extends) $("model").value = spec.model;
  afresh(spec);
  for (const name of ["negative_prompt", "num_frames", "num_inference_steps", "guidance_scale", "seed", "fps"]) if (spec[name] !== undefined && !spec.extends) form.elements[name].value = spec[name];
  write(spec.prompt);
  $("prompt").select();
}

async function first() {
  const id = jobs.get(shown).spec.extends.video;
  if (!jobs.has(id)) jobs.set(id, await call(`/v1/jobs/${id}`).catch((err) => { throw err.status === 404 ? new Error("the clip that this one continues is gone") : err; }));
  show(id);
  $("now-prompt").focus();
}

const forget = boldly(async () => {
  const id = shown, neighbour = $(id).nextElementSibling || $(id).previousElementSibling;
  if ($("forget").textContent === "Delete") { $("forget").textContent = "Delete for good?"; return; }
  await call(`/v1/jobs/${id}`, { method: "DELETE" }).catch((err) => { if (err.status !== 404) throw err; });
  drop(id);
  say("deleted");
  if (neighbour) { show(neighbour.id); $(neighbour.id).firstChild.focus(); } else $("prompt").focus();
});

function rest() {  // as the page begins
  for (const [name, text] of Object.entries(BEGIN)) $(name).textContent = text;
  for (const name of ["player", "preview", "bar", "cancel", "download", "again", "goon", "reuse", "forget", "before"]) $(name).hidden = true;
  $("player").removeAttribute("src");
  $("stage").className = "stage";
  $("empty").hidden = jobs.size > 0;
  document.title = "vidgen";
}

function surprise() {
  const list = IDEAS[$("model").value.startsWith("shapes") ? "shapes" : "any"].filter((text) => text !== $("prompt").value);
  write(list[Math.floor(Math.random() * list.length)]);
}

// beginning

async function page(cursor) {
  const found = await call(`/v1/jobs?kind=generate&limit=20${cursor ? `&cursor=${cursor}` : ""}`), last = found.data.at(-1);
  if (!last || !jobs.has(last.id)) $("more").hidden = !(next = found.next);
  for (const job of found.data) { jobs.set(job.id, Object.assign(jobs.get(job.id) || {}, job)); draw(job.id); }
}

const earlier = boldly(() => page(next));
const renew = async () => { try { await page(); follow(); } catch { /* health says so */ } };  // what was asked for elsewhere

function latest() {
  const all = [...jobs.values()], best = all.find((j) => !ENDED.includes(j.state)) || all.find((j) => j.links.video) || all[0];
  if (best && !shown) show(best.id);
}

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
  $("image-row").hidden = model.task !== "i2v" || Boolean(follows);
}

async function health() {
  if (document.hidden) return;
  try {
    const h = await (await fetch("/health")).json();
    $("health").textContent = [h.workers ? h.status : "no worker is running, so jobs wait", `${h.active_jobs} running`, `${h.queue_depth} waiting`, `${h.completed_jobs} finished`].join(" · ");
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
  if (!$("keys").checked || /INPUT|TEXTAREA|SELECT/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey || $("key-dialog").open) { if (event.key === "Escape") event.target.blur(); return; }
  const does = { n: () => $("prompt").focus(), j: () => step(1), k: () => step(-1), a: again, c: cancel, d: () => !$("download").hidden && $("download").click() };
  if (event.key === " " && !/BUTTON|A|SUMMARY|VIDEO/.test(event.target.tagName) && !$("player").hidden) { event.preventDefault(); return $("player").paused ? $("player").play() : $("player").pause(); }
  if (does[event.key]) { event.preventDefault(); does[event.key](); }
});

$("ask").onsubmit = (event) => { event.preventDefault(); boldly(() => { const spec = asked(); accepted(() => (follows ? anew(follows, spec.prompt) : clipOf(spec))); })(); };
$("ask").addEventListener("invalid", (event) => { const shut = event.target.closest("details"); if (shut) shut.open = true; }, true);  // where it is said, it must be seen
for (const [name, act] of Object.entries({ cancel, again, goon, reuse, forget, surprise, first: boldly(first), fresh: () => { afresh(); $("prompt").focus(); }, more: earlier, "key-button": askKey })) $(name).onclick = act;
$("forget").onblur = () => { $("forget").textContent = "Delete"; };
$("player").onerror = unplayed;
$("model").onchange = () => afresh();
$("keys").checked = localStorage.getItem("keys") !== "off";
$("keys").onchange = () => localStorage.setItem("keys", $("keys").checked ? "on" : "off");
$("key-dialog").onclose = () => {
  if ($("key-dialog").returnValue !== "ok") return;
  key = $("key").value.trim();
  sessionStorage.setItem("key", key);
  for (const id of [...jobs.keys()]) drop(id);  // they were another's
  begin();
};

async function begin() {
  tell(null);
  health();
  try {
    await options();
    await page();
    $("empty").hidden = jobs.size > 0;
    latest();
    follow();
  } catch (err) { tell(err); }
}
begin();
setInterval(health, 5000);
setInterval(() => { for (const job of jobs.values()) if (job.due && job.state === "running") draw(job.id); }, 1000);
document.addEventListener("visibilitychange", () => { health(); if (!document.hidden) renew(); });
