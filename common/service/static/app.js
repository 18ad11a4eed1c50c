"use strict";

const $ = (id) => document.getElementById(id);
let current = null; // the search that is shown
let latest = 0; // number of the last search that was asked for
let writing = null; // aborts the text that is being written

// An element with text and children; text never becomes markup.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

async function ask(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const key = sessionStorage.getItem("key");
  if (key) headers.authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service does not answer.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  let said = `status ${answer.status}`;
  try {
    said = (await answer.json()).error.message;
  } catch { /* no JSON: the status alone */ }
  const again = answer.headers.get("retry-after");
  throw new Error(said + (again ? ` (try again in ${again} s)` : ""));
}

function say(id, text, warning = false) {
  $(id).textContent = text;
  $(id).className = warning ? "warning" : "";
}

// bars

// A labelled bar from `low` to `high`; where low is negative it grows from zero.
function bar(name, value, low, high, shown, kind) {
  const width = high - low || 1;
  const at = (number) => (100 * (Math.min(high, Math.max(low, number)) - low)) / width;
  const zero = at(Math.max(low, Math.min(0, high)));
  const fill = make("i", { className: kind || name });
  fill.style.left = `${Math.min(zero, at(value))}%`;
  fill.style.width = `${Math.max(0.5, Math.abs(at(value) - zero))}%`;
  const track = make("div", { className: "track" }, fill);
  track.setAttribute("role", "img");
  track.setAttribute("aria-label", `${name} ${shown}`);
  return [make("span", {}, name), track, make("b", {}, shown)];
}

function bars(...rows) {
  return make("div", { className: "bars" }, ...rows.flat());
}

// search

function moved(rank, first) {
  const by = first - rank;
  if (!by) return make("span", { className: "moved", title: "did not move" }, "=");
  const word = by > 0 ? "up" : "down";
  const arrow = by > 0 ? "▲" : "▼";
  return make("span", { className: `moved ${word}`, "aria-label": `${word} by ${Math.abs(by)}` }, `${arrow} ${Math.abs(by)}`);
}

function link(id, on) {
  for (const item of document.querySelectorAll("[data-id]")) {
    if (item.dataset.id === id) item.classList.toggle("linked", on);
  }
}

function linked(item, id) {
  item.dataset.id = id;
  for (const [event, on] of [["mouseenter", true], ["mouseleave", false], ["focusin", true], ["focusout", false]]) {
    item.addEventListener(event, () => link(id, on));
  }
  return item;
}

function showFirst(found) {
  const places = new Map(found.hits.map((hit) => [hit.id, hit.rank]));
  $("first").replaceChildren(...found.first_stage.map((hit) => {
    const place = places.get(hit.id);
    const goes = place === undefined
      ? make("span", { className: "moved down" }, "▼ out")
      : moved(place, hit.rank);
    return linked(make("li", {},
      make("span", { className: "rank" }, String(hit.rank)),
      make("span", { className: "name", title: hit.id }, hit.title || hit.id),
      found.reranked ? goes : ""), hit.id);
  }));
  $("first-title").textContent = `First stage (${found.first_stage_name})`;
}

// A thumb that points up, or down when turned; drawn, since not every machine has a font with one.
function thumb(value) {
  const name = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(name, "svg");
  const path = document.createElementNS(name, "path");
  path.setAttribute("d", "M2 10h4v11H2zM8 21V10l4-8c1.7 0 2.6 1.3 2.3 3L13.5 9H20c1.4 0 2.3 1.2 2 2.5l-1.8 7.7c-.3 1.1-1.2 1.8-2.3 1.8z");
  picture.append(path);
  picture.setAttribute("viewBox", "0 0 24 24");
  picture.setAttribute("aria-hidden", "true");
  if (value < 0) picture.classList.add("turned");
  return picture;
}

function thumbs(hit) {
  const group = make("div", { className: "thumbs" });
  for (const [value, name] of [[1, "Relevant"], [-1, "Not relevant"]]) {
    const button = make("button", { type: "button", "aria-label": `${name}: ${hit.title || hit.id}`, "aria-pressed": "false", title: name }, thumb(value));
    button.disabled = !current.id;
    button.addEventListener("click", async () => {
      try {
        await ask("/feedback", { search: current.id, document: hit.id, value });
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === button));
        say("search-message", "Thank you: stored.");
      } catch (error) {
        say("search-message", error.message, true);
      }
    });
    group.append(button);
  }
  return group;
}

function showHits(found) {
  const ranges = {};
  for (const part of ["score", "reranker"]) {
    const values = found.hits.map((hit) => hit[part]).filter((value) => value !== null);
    ranges[part] = [Math.min(0, ...values), Math.max(0, ...values)];
  }
  $("hits").replaceChildren(...found.hits.map((hit) => {
    const rows = [bar("score", hit.score, ...ranges.score, hit.score.toFixed(3))];
    if (hit.reranker !== null) {
      rows.push(bar("reranker", hit.reranker, ...ranges.reranker, hit.reranker.toFixed(3)));
      rows.push(bar("resonance", hit.resonance, -1, 1, hit.resonance.toFixed(3)));
      rows.push(bar("overlap", hit.overlap, 0, 1, hit.overlap.toFixed(3)));
      rows.push(bar("coherence", hit.coherence, 0, 1, hit.coherence.toFixed(3)));
    }
    const head = make("div", { className: "head" },
      make("span", { className: "rank" }, String(hit.rank)),
      make("strong", {}, hit.title || hit.id),
      found.reranked ? moved(hit.rank, hit.first_rank) : "");
    return linked(make("li", {}, head, make("div", { className: "id" }, hit.id),
      make("p", { className: "text" }, hit.text), bars(...rows), thumbs(hit)), hit.id);
  }));
  $("hits-title").textContent = found.reranked ? `Reranked by ${found.model}` : "As the first stage found them";
}

function show(found) {
  current = found;
  showFirst(found);
  showHits(found);
  const sure = found.confidence;
  $("confidence").replaceChildren(sure === null
    ? "not known: the reranker is not calibrated"
    : bars(bar("confidence", sure, 0, 1, sure.toFixed(2))));
  const total = found.seconds.total || 1;
  $("latency").replaceChildren(bars(...Object.entries(found.seconds).map(([stage, seconds]) =>
    bar(stage, seconds, 0, total, `${(1000 * seconds).toFixed(1)} ms`))));
  $("answer").hidden = false;
  if (found.fallback) say("search-message", `Not reranked: ${found.fallback}`, true);
  else say("search-message", found.hits.length ? `${found.hits.length} hits${found.cache_hit ? ", scores from the cache" : ""}.` : "Nothing was found.");
}

$("search-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const number = ++latest;
  say("search-message", "Searching …");
  $("go").disabled = true;
  try {
    const answer = await ask("/search", {
      query: $("query").value, top_k: Number($("top").value) || 8, rerank: $("rerank").checked,
    });
    const found = await answer.json();
    if (number === latest) show(found);
  } catch (error) {
    if (number === latest) say("search-message", error.message, true);
  } finally {
    $("go").disabled = false;
  }
});

// text

const NUMBERS = ["max_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "top_k"];

for (const output of document.querySelectorAll("output")) {
  const input = $(output.htmlFor.value);
  input.addEventListener("input", () => { output.textContent = input.value; });
}

// The data of server-sent events, one at a time.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

$("text-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (writing) return;
  const body = { prompt: $("prompt").value, stream: true };
  for (const name of NUMBERS) body[name] = Number($(name).value);
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  writing = new AbortController();
  $("write").disabled = true;
  $("stop").disabled = false;
  say("text-message", "Writing …");
  const text = document.createTextNode("");
  $("written").replaceChildren(make("span", { className: "given" }, body.prompt), text);
  $("written").hidden = false;
  try {
    let tokens = null;
    for await (const data of events(await ask("/v1/completions", body, writing.signal))) {
      if (data === "[DONE]") break;
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      text.data += piece.choices[0].text;
      if (piece.usage) tokens = piece.usage.completion_tokens;
    }
    say("text-message", tokens === null ? "Done." : `Done: ${tokens} tokens.`);
  } catch (error) {
    if (error.name === "AbortError") say("text-message", "Stopped.");
    else say("text-message", error.message, true);
  } finally {
    writing = null;
    $("write").disabled = false;
    $("stop").disabled = true;
  }
});

$("stop").addEventListener("click", () => writing && writing.abort());

// tabs, by mouse and by arrow keys

const tabs = [$("tab-search"), $("tab-text")];

function choose(tab) {
  for (const other of tabs) {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
}

for (const tab of tabs) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs[1 - tabs.indexOf(tab)];
    choose(other);
    other.focus();
  });
}

// state and key

async function state() {
  try {
    const about = await (await fetch("/ready")).json();
    const parts = about.ready
      ? [`${about.documents} documents`, about.model ? `${about.model} (${about.reranker})` : "no reranker"]
      : [`not ready: ${about.problem}`];
    if (about.language_model) parts.push(about.language_model);
    $("state").textContent = parts.join(" · ");
    if (!about.language_model) say("text-message", "This service has no language model.");
    $("write").disabled = !about.language_model;
  } catch {
    $("state").textContent = "the service does not answer";
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  $("key-form").hidden = true;
  say("search-message", "Ask again.");
});

state();
