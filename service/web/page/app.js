// Puts the page together: which desk is on it, what stands around the boxes, and the address that leads back to a task.

import * as api from "./api.js";
import { showBoxes } from "./boxes.js";
import { LANGUAGES, snippet } from "./code.js";
import { Desk } from "./desk.js";
import { button, el, list, percent, plural, small, write } from "./dom.js";
import { Try } from "./try.js";

const $ = (id) => document.getElementById(id);
const say = (text) => {
  $("said").textContent = "";
  $("said").textContent = text;
};
const table = new Try($("try"), say);
let desk = null;
let listed = false; // whether there are tasks to be listed, as far as is known
let language = LANGUAGES[0];

// A key, when the service asks for one.

api.keys.ask = (refused) =>
  new Promise((resolve) => {
    const dialog = $("key");
    const input = dialog.querySelector("input");
    write(dialog.querySelector(".hint"), refused ? "The last one was not accepted." : "");
    input.value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve((dialog.returnValue && input.value.trim()) || null), { once: true });
    dialog.showModal();
  });

// The desk: a new one, or that of a task.

function put(next) {
  desk?.close();
  desk = next;
  $("boxes").replaceChildren();
  showBoxes(next, $("boxes"));
  table.follow(next);
  next.addEventListener("change", draw);
  next.addEventListener("task", () => {
    if (location.hash.slice(1) !== next.name) history.replaceState(null, "", `#${next.name}`);
  });
  next.addEventListener("said", (event) => say(said(event.detail)));
  next.addEventListener("problem", ({ detail }) => {
    const lost = next.unsent ? "Not all that you did there has arrived. " : "";
    tell(next === desk ? detail : `The task "${next.name}": ${lost}${detail}`);
  });
  tell("");
  draw();
  lookForTasks();
}

async function arrive() {
  const name = location.hash.slice(1);
  if (desk?.task && desk.name === name) return;
  const next = new Desk(/^[A-Za-z0-9_-]{1,64}$/.test(name) ? name : null);
  put(next);
  if (!next.chosen || (await next.open()) || next !== desk) return;
  put(new Desk(name));
  tell(`There is no task "${name}" here. Add photos, and it will be learned under that name.`);
}

function fresh() {
  history.pushState(null, "", location.pathname + location.search);
  put(new Desk());
  $("boxes").querySelector("input").focus();
}

// The tasks that are there. Where there are none, or none for this key, there is nothing to be seen of it.

async function lookForTasks() {
  listed = await api.tasks().then(({ items }) => items.length > 0, () => false);
  draw();
}

async function listTasks(after = "") {
  const [names, more] = $("tasks").querySelectorAll("ul, [type=button]");
  more.disabled = true; // until it is known what comes next
  try {
    const { items, next_cursor: next } = await api.tasks(after);
    const current = (name) => (desk.task && desk.name === name ? "page" : null);
    const rows = items.map(({ task }) => el("li", {}, el("a", { href: `#${task}`, "aria-current": current(task) }, task)));
    if (after) names.append(...rows);
    else names.replaceChildren(...rows);
    more.hidden = next === null;
    more.disabled = false;
    more.onclick = () => listTasks(next);
    if (!$("tasks").open) $("tasks").showModal();
    rows[0]?.firstChild.focus();
  } catch (error) {
    $("tasks").close();
    tell(error.message);
  }
}

// Photos that no task has learned are nowhere but here; those that are on their way to one need not be waited for.
function loose() {
  const arrives = (state) => state === "learned" || (state !== "failed" && desk.task && !desk.away);
  return desk.boxes.some((box) => box.shown.some(({ state }) => !arrives(state)));
}

const mayLeave = () => !loose() || confirm("The photos here are in no task yet and would be gone. Leave them?");

// A name that was typed may be that of a task, which is opened unless there is something here.
async function openNamed() {
  const [here, { name }] = [desk, desk];
  try {
    await api.get(name);
  } catch (error) {
    if (error.status !== 404 && here === desk) tell(error.message);
    return;
  }
  if (here !== desk || desk.name !== name || desk.task || loose()) return; // it has gone on meanwhile
  history.pushState(null, "", `#${name}`);
  arrive();
}

function tell(text) {
  write($("problem").firstElementChild, text);
  $("problem").hidden = !text;
}

// What stands around the boxes.

function draw() {
  const { task } = desk;
  const name = $("task");
  if (document.activeElement !== name) name.value = desk.name;
  name.readOnly = task !== null;
  document.title = task ? `${desk.name} - fewshot` : "fewshot";
  $("forget").hidden = !task;
  $("list").hidden = !listed && !task;
  $("undo").hidden = !desk.undoable;
  $("undo").title = desk.undoable ? `Undo: ${desk.undoable}` : "";
  $("retain").parentElement.hidden = task !== null;
  const kept = task?.retained ? "The photos are kept with the task." : "The photos are not kept, only what was learned.";
  write($("kept"), task ? kept : "");
  $("banner").hidden = !desk.away;
  if (desk.away) {
    write($("banner").firstElementChild, `${desk.away} What is on this page is safe, and it is asked again by itself.`);
  }
  drawReport(task);
  drawCode(task);
}

const drawSuspects = list($("report").querySelector(".suspects"), newSuspect, (node, id) => node.draw(id));

function newSuspect(id) {
  const link = button("", { class: "suspect", onclick: () => point(id) });
  const node = el("li", {}, link);
  node.draw = () => {
    const { looks_like: other } = desk.task.report.suspects.find((suspect) => suspect.example === id);
    write(link, `Show ${small(nameOf(id))}`);
    link.title = `It looks like ${other}`;
  };
  return node;
}

function nameOf(id) {
  const place = desk.placeOf(id);
  return place ? `Photo ${place.index + 1} of ${desk.labelOf(place.box)}` : id;
}

function point(id) {
  const place = desk.placeOf(id);
  if (!place) return;
  const photo = $("boxes").children[desk.boxes.indexOf(place.box)].querySelectorAll(".photo")[place.index];
  photo.scrollIntoView({ block: "nearest" });
  photo.querySelector("button").focus();
}

function drawReport(task) {
  const [lead, range, advice] = $("report").querySelectorAll(".lead, .range, .advice");
  const report = task?.report;
  const many = (task?.classes ?? []).reduce((sum, { shots }) => sum + (shots > 1 ? shots : 0), 0);
  if (!task) {
    const begun = desk.boxes.filter((box) => box.shown.length).length;
    const steps = ["Name two boxes and put a photo or more into each.", "Now a photo into another box.", "Learning..."];
    write(lead, steps[Math.min(begun, 2)]);
    write(advice, "It learns at once, and again with every photo. There is nothing to start and nothing to wait for.");
  } else if (report?.accuracy === null || report?.accuracy === undefined) {
    write(lead, "Learned. Try it with a photo it has not seen.");
    write(advice, said(report?.advice) || "With two photos of a class or more, it can tell how well it does.");
  } else {
    const how = report.estimate === "leave-one-out" ? "one at a time" : "in turn";
    const right = many - report.confusions.reduce((sum, { count }) => sum + count, 0);
    const [low, high] = (report.interval ?? []).map((share) => Math.round(100 * share));
    const [share, sure] = [percent(report.accuracy), `95 % interval: ${low} to ${high}`];
    if (report.twins.length) {
      // A count of photos would not fit a share in which some count as one.
      write(lead, `Held back ${how}, ${share} were recognised; photos that look alike count as one.`);
      write(range, sure);
    } else {
      write(lead, `Held back ${how}, ${right} of ${plural(many, "photo")} ${right === 1 ? "was" : "were"} recognised.`);
      write(range, `${share} (${sure})`);
    }
    write(advice, said(report.advice));
  }
  range.hidden = (report?.interval ?? null) === null;
  drawSuspects((report?.suspects ?? []).map(({ example }) => example).filter((id) => desk.placeOf(id)));
}

// The service's sentence, with photos called what they are called on the page.
function said(sentence = "") {
  return sentence.replace(/([Ee]xample )?(ex_[0-9a-f]+)( of ('[^']*'|"[^"]*"))?/g, (_, word, id) =>
    word?.startsWith("E") ? nameOf(id) : small(nameOf(id)),
  );
}

const tabs = LANGUAGES.map((name) => button(name, { role: "tab", "aria-controls": "snippet", onclick: () => choose(name) }));
$("code").querySelector("[role=tablist]").append(...tabs);
$("code").querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const next = (LANGUAGES.indexOf(language) + step + LANGUAGES.length) % LANGUAGES.length;
  choose(LANGUAGES[next]);
  tabs[next].focus();
});

function choose(name) {
  language = name;
  drawCode(desk.task);
}

function drawCode(task) {
  $("code").hidden = !task;
  tabs.forEach((tab, index) => {
    const selected = LANGUAGES[index] === language;
    tab.setAttribute("aria-selected", selected);
    tab.tabIndex = selected ? 0 : -1;
  });
  if (!task) return;
  const text = snippet(language, {
    classify: api.address(desk.name, "classify"),
    examples: api.address(desk.name, "examples"),
    labels: task.classes.map(({ label }) => label),
    key: api.key() !== null,
  });
  write($("code").querySelector("code"), text);
  $("export").href = api.exportAddress(desk.name);
}

async function copy() {
  const code = $("code").querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code); // without https there is no clipboard, but there is a selection
    document.execCommand("copy");
  }
  write($("copy"), "Copied");
  say("Copied.");
  setTimeout(() => write($("copy"), "Copy"), 1500);
}

// By hand, so that the key goes along and a refusal is a sentence rather than a file.
async function download(event) {
  event.preventDefault();
  try {
    const blob = await api.exported(desk.name);
    const link = el("a", { href: URL.createObjectURL(blob), download: `${desk.name}.onnx` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) {
    tell(error.message);
  }
}

// Answers without the service, where it has what a browser needs for that.

async function offerOffline() {
  const { Offline, offered } = await import("./offline.js");
  const [part, offline] = [$("offline"), new Offline()];
  const [input, status] = [part.querySelector("input"), part.querySelector("p")];
  part.hidden = !(await offered().catch(() => false));
  input.addEventListener("change", async () => {
    table.offline = null;
    write(status, input.checked ? "Loading the model..." : "");
    if (!input.checked) return table.ask();
    try {
      if (!desk.task) throw new Error("there is no task yet.");
      await offline.load(desk.task);
      table.offline = offline;
      write(status, "Answers come from this browser; photos stay in it.");
    } catch (error) {
      input.checked = false;
      write(status, `It cannot be loaded: ${error.message}`);
    }
    table.ask();
  });
}

// Taken as it is typed, for a photo may be dropped before the field is left.
$("task").addEventListener("input", () => desk.call($("task").value));
$("task").addEventListener("change", () => {
  const right = desk.call($("task").value);
  tell(right ? "" : "A task name has 1 to 64 letters, digits, '-' or '_'.");
  $("task").value = desk.name;
  desk.retry();
  if (right && !desk.task && !loose()) openNamed();
});
$("task").addEventListener("keydown", (event) => event.key === "Enter" && event.target.blur());
$("fresh").addEventListener("click", () => mayLeave() && fresh());
$("list").addEventListener("click", () => listTasks());
$("tasks").addEventListener("click", (event) => {
  if (!event.target.matches("a")) return;
  if (mayLeave()) $("tasks").close();
  else event.preventDefault();
});
$("forget").addEventListener("click", async () => {
  if (!confirm(`Delete the task "${desk.name}", here and in the service?`)) return;
  await desk.forget();
  if (!desk.task) fresh();
});
$("undo").addEventListener("click", () => desk.undo());
$("more").addEventListener("click", () => {
  desk.addBox();
  $("boxes").lastElementChild.querySelector("input").focus();
});
$("retain").addEventListener("change", () => (desk.retain = $("retain").checked));
$("copy").addEventListener("click", copy);
$("export").addEventListener("click", download);
$("banner").querySelector("button").addEventListener("click", () => desk.tryNow());
$("problem").querySelector("button").addEventListener("click", () => tell(""));
document.addEventListener("keydown", (event) => {
  const undo = (event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "z";
  if (!undo || event.target.matches("input:not([type=checkbox])")) return;
  event.preventDefault();
  desk.undo();
});
window.addEventListener("online", () => desk.tryNow());
window.addEventListener("hashchange", arrive);
window.addEventListener("beforeunload", (event) => desk.unsent && event.preventDefault());
arrive();
if ("offline" in document.documentElement.dataset) offerOffline();
