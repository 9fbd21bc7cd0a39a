// The third column: a photo, or the camera's picture, and what the task says of it, anew whenever the task changes.

import * as api from "./api.js";
import { Camera } from "./camera.js";
import { button, el, list, percent, write } from "./dom.js";
import { accepts, chooser } from "./intake.js";
import { prepare } from "./photos.js";

const BETWEEN_FRAMES_MS = 120;
const BETWEEN_WORDS_MS = 2000; // a screen reader is not talked over

export class Try {
  desk = null;
  offline = null; // when switched on: answers in this browser
  #photo = null;
  #turn = 0; // counts what has come onto the table: whatever belongs to an earlier one is too late
  #answer = null;
  #asking = false;
  #again = false;
  #said = { label: undefined, at: 0 };

  constructor(root, say) {
    this.say = say;
    const find = (selector) => root.querySelector(selector);
    this.picture = find("img");
    this.hint = find(".invitation");
    this.noteLine = find(".notes");
    this.answerPart = find(".answer");
    this.verdict = find(".verdict");
    this.share = find(".share");
    this.known = find(".known");
    this.forced = find(".forced");
    this.nearest = find(".nearest");
    this.waiting = find(".waiting");
    this.drawBars = list(find(".bars"), newBar, (node, label) => node.draw(this.#answer, label));
    this.drawNearest = list(find(".nearest ul"), () => el("li", {}, el("img", { alt: "" }), el("span")), (node, near) => {
      const place = this.desk.placeOf(near.example);
      node.firstChild.hidden = !place?.photo.url;
      if (place?.photo.url) node.firstChild.src = place.photo.url;
      write(node.lastChild, near.label);
    });
    const video = find("video");
    this.camera = new Camera(video, () => this.#draw());
    this.video = video;
    const [choose, input] = chooser("Choose", false, (files) => this.take(files));
    this.open = button("Camera", { picture: "camera", onclick: () => this.#live() });
    this.closeCamera = button("Close camera", { class: "main", onclick: () => this.camera.stop() });
    find(".actions").append(choose, this.open, this.closeCamera, input);
    this.hint.addEventListener("click", () => choose.click());
    accepts(root, (files) => this.take(files));
    this.#draw();
  }

  // Follows this desk from now on, with nothing on the table.
  follow(desk) {
    this.camera.stop();
    this.desk = desk;
    this.#turn++;
    this.#show(null);
    this.#answer = null;
    desk.addEventListener("task", () => desk === this.desk && this.ask());
    desk.addEventListener("change", () => desk === this.desk && this.#draw());
    this.#draw();
  }

  async take(files) {
    if (!files.length) return this.#note("That was no file. Save the picture first, or copy it and paste it here.");
    this.camera.stop();
    const turn = ++this.#turn;
    this.#answer = null;
    this.#note("");
    this.#draw();
    let photo = null;
    let why = "";
    try {
      photo = await prepare(files[0]);
    } catch (error) {
      why = `${files[0].name || "The picture"}: ${error.message}`;
    }
    if (turn !== this.#turn) return;
    this.#show(photo);
    this.#note(why);
    await this.ask();
  }

  // Asks about what is on the table; of several questions at a time only the newest is asked.
  async ask() {
    const desk = this.desk;
    if (!this.#photo || !desk.task) return this.#draw();
    this.#again = true;
    if (this.#asking) return;
    this.#asking = true;
    try {
      while (this.#again && this.#photo && desk === this.desk) {
        this.#again = false;
        const [live, turn] = [this.camera.on, this.#turn];
        const answer = await desk.patiently(() => turn === this.#turn && this.#classify(desk, this.#photo, !live));
        if (turn !== this.#turn) continue;
        this.#answer = answer;
        this.#note("");
        this.#draw();
        this.#tell(live);
      }
    } catch (error) {
      if (desk === this.desk && !this.#again) {
        this.#answer = null;
        this.#note(error.message);
        this.#draw();
      }
    } finally {
      this.#asking = false;
    }
    if (this.#again) this.ask(); // the desk was changed meanwhile
  }

  #classify(desk, photo, explain) {
    return this.offline ? this.offline.classify(desk.task, photo) : api.classify(desk.name, photo, { explain });
  }

  async #live() {
    const turn = ++this.#turn;
    try {
      this.#show(null);
      this.#note("");
      const starting = this.camera.start();
      this.#draw();
      this.closeCamera.focus();
      await starting;
      let frame = null;
      while (this.camera.on) {
        const next = await this.camera.frame();
        if (turn !== this.#turn) return;
        this.#photo = frame = next;
        await this.ask();
        await new Promise((resolve) => setTimeout(resolve, BETWEEN_FRAMES_MS));
      }
      if (frame && turn === this.#turn) this.#show(frame); // the last one stays, unless another has come
      this.#draw();
    } catch (error) {
      if (turn === this.#turn) this.#note(error.message);
    }
  }

  #show(blob) {
    if (this.picture.src) URL.revokeObjectURL(this.picture.src);
    this.#photo = blob;
    this.picture.hidden = !blob;
    if (blob) this.picture.src = URL.createObjectURL(blob);
    else this.picture.removeAttribute("src");
  }

  #note(text) {
    write(this.noteLine, text);
  }

  #tell(live) {
    const { label, probability } = this.#answer;
    const text = label === null ? "None of these." : `${label}, ${percent(probability)}.`;
    const now = Date.now();
    if (live && (label === this.#said.label || now - this.#said.at < BETWEEN_WORDS_MS)) return;
    this.#said = { label, at: now };
    this.say(text);
  }

  #draw() {
    const { on } = this.camera;
    this.video.hidden = !on;
    this.open.hidden = on;
    this.closeCamera.hidden = !on;
    this.hint.hidden = on || this.#photo !== null;
    if (on) this.picture.hidden = true;
    const task = this.desk?.task;
    const answer = task && this.#photo ? this.#answer : null;
    this.waiting.hidden = Boolean(task) || !this.#photo;
    this.answerPart.hidden = !task;
    this.drawBars(task ? task.classes.map(({ label }) => label) : []);
    const none = answer !== null && answer.label === null;
    this.answerPart.classList.toggle("none", none);
    this.answerPart.classList.toggle("blank", answer === null);
    this.forced.hidden = !none;
    const looking = this.noteLine.textContent ? "No answer" : "Looking..."; // the note says why
    const nothing = this.#photo ? looking : "No photo yet";
    write(this.verdict, answer === null ? nothing : none ? "None of these" : answer.label);
    write(this.share, answer === null || none ? "" : percent(answer.probability));
    const known = answer?.known;
    this.known.hidden = known === undefined || known === null;
    if (!this.known.hidden) write(this.known, familiarity(known, none));
    const near = answer?.nearest ?? [];
    this.nearest.hidden = !near.some(({ example }) => this.desk.placeOf(example)?.photo.url);
    this.drawNearest(this.nearest.hidden ? [] : near);
  }
}

function familiarity(known, none) {
  const share = known < 0.01 ? "under 1 %" : percent(known);
  return none ? `It looks like nothing in the boxes (familiarity ${share}).` : `Familiarity ${share}`;
}

function newBar(label) {
  const value = el("span", { class: "value" });
  const fill = el("span", { class: "fill" });
  const node = el("li", {}, el("span", { class: "label" }, label), el("span", { class: "track" }, fill), value);
  node.draw = (answer) => {
    const share = answer?.probabilities?.[label] ?? 0;
    fill.style.transform = `scaleX(${share})`;
    write(value, answer ? percent(share) : "");
    node.classList.toggle("best", answer?.label === label);
  };
  return node;
}
