// The boxes: one for each class, with its name, its photos and the ways to add more.

import { Camera } from "./camera.js";
import { button, el, icon, list, plural, small, write } from "./dom.js";
import { accepts, chooser } from "./intake.js";

const BURST_MS = 250; // between photos while the button is held
const NO_FILE = "That was no file. Save the picture first, or copy it and paste it here.";

export function showBoxes(desk, parent) {
  const draw = list(parent, (box) => newBox(desk, box), (node, _, index) => node.draw(index));
  const added = () => draw(desk.boxes);
  desk.addEventListener("change", added);
  added();
}

function newBox(desk, box) {
  const add = (files) => (files.length ? desk.add(box, files, name.value) : desk.note(box, NO_FILE));
  const commit = () => desk.rename(box, name.value);
  const name = el("input", { class: "name", maxlength: 100, autocomplete: "off", spellcheck: "false", onchange: commit });
  name.addEventListener("keydown", (event) => event.key === "Enter" && name.blur());
  const count = el("span", { class: "count" });
  const remove = button("Remove this class", { only: true, picture: "close", class: "quiet", onclick: () => desk.removeBox(box) });

  const photos = el("ul", { class: "photos" });
  const drawPhotos = list(photos, (photo) => newPhoto(desk, box, photo), (node, _, index) => node.draw(index));
  const notes = el("ul", { class: "notes", role: "status" });
  const drawNotes = list(notes, (note) => newNote(desk, box, note), () => {});

  const video = el("video", { muted: true, playsinline: true, "aria-label": "What the camera sees" });
  const camera = new Camera(video, () => draw());
  const open = button("Camera", { picture: "camera", onclick: start });
  const take = button("Take photos", { class: "main", title: "Hold for several", ...holding(shoot) });
  const stage = el("div", { class: "stage", hidden: true }, video);
  const working = el("div", { class: "actions", hidden: true }, take, button("Close", { onclick: () => camera.stop() }));
  const [choose, input] = chooser("Choose", true, add);
  const actions = el("div", { class: "actions" }, choose, open, input);
  const invitation = el("p", { class: "invitation" }, icon("drop"), el("span", {}, "Drop or paste photos here"));
  const head = el("header", {}, name, count, remove);
  const node = el("section", { class: "box card" }, head, photos, invitation, stage, working, actions, notes);
  invitation.addEventListener("click", () => choose.click());
  accepts(node, add);

  async function start() {
    stage.hidden = working.hidden = false;
    actions.hidden = true;
    take.focus();
    await camera.start().catch((error) => desk.note(box, error.message));
    draw();
  }

  async function shoot() {
    const picture = await camera.frame().catch(() => null);
    if (picture) add([new File([picture], "The camera's photo")]);
  }

  function draw() {
    stage.hidden = working.hidden = !camera.on;
    actions.hidden = camera.on;
    drawPhotos(box.shown);
    drawNotes(box.notes);
    write(count, box.shown.length ? plural(box.shown.length, "photo") : "");
    photos.hidden = !box.shown.length;
    invitation.hidden = camera.on;
    node.classList.toggle("empty", !box.shown.length);
  }

  node.draw = (index) => {
    const label = desk.labelOf(box);
    if (document.activeElement !== name) name.value = box.wanted ?? box.label;
    name.placeholder = label;
    name.setAttribute("aria-label", `Name of class ${index + 1}`);
    node.setAttribute("aria-label", `Class ${label}`);
    remove.hidden = desk.boxes.length < 3;
    draw();
  };
  return node;
}

function newPhoto(desk, box, photo) {
  const picture = el("img", { alt: "", decoding: "async", draggable: "false" });
  const bare = el("span", { class: "bare" });
  const caption = el("span", { class: "caption" });
  const remove = button("Remove", { only: true, picture: "close", onclick: taken });
  const node = el("li", { tabindex: "-1" }, picture, bare, caption, remove);

  function taken() {
    const next = node.nextElementSibling ?? node.previousElementSibling;
    const place = next?.querySelector("button") ?? node.closest(".box").querySelector(".actions button");
    desk.remove(box, photo);
    if (!node.isConnected) place.focus(); // whoever works by keyboard goes on from there
  }

  node.draw = (index) => {
    const number = `Photo ${index + 1} of ${desk.labelOf(box)}`;
    const suspect = (desk.task?.report?.suspects ?? []).find((other) => other.example === photo.id);
    if (photo.url && picture.getAttribute("src") !== photo.url) picture.src = photo.url;
    picture.hidden = !photo.url;
    bare.hidden = Boolean(photo.url);
    write(bare, photo.id ? photo.id.slice(3, 9) : "");
    picture.alt = suspect ? `${number}, looks like ${suspect.looks_like}` : number;
    write(caption, suspect ? `${suspect.looks_like}?` : "");
    caption.hidden = !suspect;
    remove.setAttribute("aria-label", `Remove ${small(number)}`);
    node.title = suspect ? `${number} looks like ${suspect.looks_like}` : photo.url ? "" : `${number}: ${photo.id ?? ""}`;
    node.className = `photo ${photo.state} ${suspect ? "suspect" : ""}`;
  };
  return node;
}

function newNote(desk, box, note) {
  const again = note.retry ? button("Try again", { onclick: () => desk.retry(box) }) : null;
  const dismiss = button("Dismiss", { only: true, picture: "close", onclick: () => desk.dismiss(box, note) });
  return el("li", { class: "note" }, el("span", {}, note.text), again, dismiss);
}

// One photo at a press, more while it is held; the keyboard's press is a click without a pointer.
function holding(shoot) {
  let timer = null;
  const stop = () => clearInterval(timer);
  return {
    onpointerdown: (event) => {
      if (event.button !== 0) return;
      // The button moves away from under it as the photos above it fill another row.
      event.currentTarget.setPointerCapture(event.pointerId);
      stop();
      shoot();
      timer = setInterval(shoot, BURST_MS);
    },
    onlostpointercapture: stop,
    onclick: (event) => event.detail === 0 && shoot(),
  };
}
