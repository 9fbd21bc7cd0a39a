// What is on the desk, and its likeness in the service: boxes with photos, and the task that they have become.
//
// Whatever a person does is shown at once and then done in the service, one step after the other. A step reads what is
// to be done when its turn comes, so quick drops become one request; a step that got no answer is done again. Nothing
// on the page is lost by an error. Fires "change" for whatever is to be drawn, "task" when the task has moved, "said"
// with a sentence to be read out, "problem" with one to be shown. Knows nothing of elements.

import * as api from "./api.js";
import { Away, Problem } from "./api.js";
import { plural } from "./dom.js";
import { exampleId, prepare } from "./photos.js";

const BATCH = { photos: 48, bytes: 8_000_000 };
const LONGEST_PAUSE_S = 15;
const LOOKS = ["amber", "brave", "calm", "clear", "early", "gentle", "green", "lucky", "quiet", "silver", "sunny", "warm"];
const THINGS = ["birch", "comet", "fern", "harbor", "kite", "lantern", "maple", "otter", "pebble", "robin", "sail", "wren"];

const pick = (from) => from[Math.floor(Math.random() * from.length)];
// 1.3 million names: among a thousand tasks one in 1,300 new ones meets a name that is taken, and is made up again.
const madeUp = () => `${pick(LOOKS)}-${pick(THINGS)}-${1000 + Math.floor(9000 * Math.random())}`;
const normal = (label) => label.normalize("NFC").replace(/\s+/g, " ").trim();
let count = 0;

class Photo {
  order = count++;
  id = null;
  blob = null; // null: learned earlier, and not here any more
  url = null;
  gone = false; // taken away on the page, but not in the service yet

  // reading -> waiting -> sending -> learned; failed: may be sent again
  constructor(state, name = "The picture") {
    this.state = state;
    this.name = name;
  }

  show(blob) {
    this.blob = blob;
    this.url = URL.createObjectURL(blob);
  }
}

class Box {
  photos = [];
  notes = []; // {text, retry}
  label = "";
  wanted = null; // the label to be, while the photos move to it
  formerly = null;
  gone = false;

  get shown() {
    return this.photos.filter((photo) => !photo.gone);
  }

  // What counts as an example: in the service, or on its way.
  get held() {
    return this.shown.filter((photo) => ["sending", "learned"].includes(photo.state));
  }

  drop(photo) {
    this.photos = this.photos.filter((other) => other !== photo);
  }
}

export class Desk extends EventTarget {
  task = null;
  retain = false;
  away = null; // why the service does not answer; it is asked again
  #all = [new Box(), new Box()];
  #undo = []; // {version, what}
  #seen = new Map(); // example id -> photo, also of those taken away: an undo shows them again
  #last = Promise.resolve();
  #resting = new Set();
  #closed = false;

  constructor(name = null) {
    super();
    this.chosen = name !== null;
    this.name = name ?? madeUp();
  }

  // A task of the service, as after a reload. Resolves to false when there is none of that name.
  async open() {
    let found = true;
    await this.#step(async () => {
      try {
        const task = await api.get(this.name);
        const { items } = await api.versions(this.name).catch(unlessAway({ items: [] }));
        const earlier = items.map((item) => item.version).filter((version) => version < task.version);
        this.#undo = earlier.sort((a, b) => a - b).map((version) => ({ version, what: "the last change" }));
        this.#adopt(task);
        this.#showKept();
      } catch (error) {
        if (error.status !== 404 && error.status !== 422) throw error;
        found = false;
      }
    });
    return found;
  }

  // The task stays in the service; what is to be done there is still done, unless the service is away. Afterwards nothing
  // fires but "problem".
  close() {
    this.#closed = true;
    this.tryNow();
    this.#hide();
  }

  #hide() {
    for (const { url } of new Set([...this.#photos, ...this.#seen.values()])) if (url) URL.revokeObjectURL(url);
  }

  get boxes() {
    return this.#all.filter((box) => !box.gone);
  }

  get #photos() {
    return this.#all.flatMap((box) => box.photos);
  }

  // Whether the service is still to be told something, or has refused it.
  get unsent() {
    return this.#all.some((box) => box.wanted || box.photos.some(({ gone, state }) => gone || state !== "learned"));
  }

  get undoable() {
    return this.#undo.at(-1)?.what ?? null;
  }

  placeOf(id) {
    for (const box of this.boxes) {
      const index = box.shown.findIndex((photo) => photo.id === id);
      if (index >= 0) return { box, index, photo: box.shown[index] };
    }
    return null;
  }

  // False when the service would not have such a name.
  call(name) {
    const given = name.trim().replace(/\s+/g, "-");
    if (this.task || given === this.name) return true;
    if (!/^[A-Za-z0-9_-]{1,64}$/.test(given)) return false;
    this.name = given;
    this.chosen = true;
    return true;
  }

  // The name that a box goes by: what was typed, or what its empty field shows.
  labelOf(box) {
    if (box.wanted || box.label) return box.wanted ?? box.label;
    const taken = new Set(this.#all.flatMap((other) => [other.label, other.wanted]));
    let number = this.#all.indexOf(box) + 1;
    while (taken.has(`Class ${number}`)) number++;
    return `Class ${number}`;
  }

  addBox() {
    const box = new Box();
    this.#all.push(box);
    this.#changed();
    return box;
  }

  removeBox(box) {
    if (box.held.length && !this.#mayLose(box)) return;
    if (box.held.length) this.#removeClass(box, true);
    else this.#all = this.#all.filter((other) => other !== box);
    while (this.boxes.length < 2) this.addBox();
    this.#changed();
  }

  rename(box, typed) {
    const label = normal(typed);
    if (label === this.labelOf(box)) return;
    const twin = this.boxes.find((other) => other !== box && (other.label || other.wanted) && this.labelOf(other) === label);
    if (api.isFolder(label)) this.note(box, `A class cannot be called "${label}" here. Choose another name.`);
    else if (twin) this.note(box, `There is a box named "${label}" already.`);
    else if (!box.photos.length) box.label = label;
    else if (label && !box.held.every((photo) => photo.blob)) {
      this.note(box, "Another name needs the photos, and those of this class are no longer here. Add them again.");
    } else if (label) {
      box.wanted = label;
      this.#step(() => this.#relabel(box));
    }
    this.#changed();
  }

  // Takes files into a box, under the name that was typed: each is made ready, and what cannot be used is named beside
  // the box.
  async add(box, files, typed) {
    if (!files.length) return;
    box.notes = [];
    this.rename(box, typed);
    box.label ||= this.labelOf(box);
    const photos = files.map((file) => new Photo("reading", file.name));
    box.photos.push(...photos);
    this.#changed();
    await inTurn(files, 4, async (file, index) => {
      try {
        photos[index].show(await prepare(file));
        photos[index].state = "waiting";
      } catch (error) {
        this.#refuse(box, photos[index], error.message);
      }
      this.#changed();
    });
    await this.#step(() => this.#send());
    if (this.#closed) this.#hide();
  }

  remove(box, photo) {
    if (!["sending", "learned"].includes(photo.state)) {
      box.drop(photo);
    } else if (box.held.length > 1) {
      photo.gone = true;
      this.#step(() => this.#removeExample(box, photo));
    } else if (this.#mayLose(box)) {
      this.#removeClass(box, false);
    }
    this.#changed();
  }

  // Sends again what failed, in this box or in all.
  retry(...boxes) {
    for (const box of boxes.length ? boxes : this.boxes) {
      for (const photo of box.photos) if (photo.state === "failed") photo.state = "waiting";
      box.notes = box.notes.filter((note) => !note.retry);
    }
    this.#changed();
    return this.#step(() => this.#send());
  }

  note(box, text, retry = false) {
    if (this.#closed) this.#fire("problem", text); // there is no box to be seen
    if (!box.notes.some((note) => note.text === text)) box.notes.push({ text, retry });
    this.#changed();
  }

  dismiss(box, note) {
    box.notes = box.notes.filter((other) => other !== note);
    this.#changed();
  }

  undo() {
    return this.#step(async () => {
      const last = this.#undo.at(-1);
      if (!last) return;
      const task = await api.rollback(this.name, last.version).catch((error) => {
        if (error.code === "version_not_found") {
          this.#undo = []; // nor is any that is older
          error.message = `Not undone: ${last.what}. What was before is not kept any more.`;
        } else if (!(error instanceof Away)) this.#undo.pop();
        throw error;
      });
      this.#undo.pop();
      this.#adopt(task);
      this.#fire("said", `Undone: ${last.what}.`);
    });
  }

  // Afterwards there is no task, unless the service refused.
  forget() {
    return this.#step(async () => {
      await api.forget(this.name).catch((error) => {
        if (error.code !== "task_not_found") throw error; // perhaps by this very request, whose answer was lost
      });
      this.task = null;
    });
  }

  tryNow() {
    for (const wake of this.#resting) wake();
  }

  // Resolves when `work` is done, however long the service is away. Any other error is the caller's, and so is that one
  // once the desk is closed.
  async patiently(work) {
    for (let pause = 1; ; pause = Math.min(2 * pause, LONGEST_PAUSE_S)) {
      try {
        const done = await work();
        this.#isAway(null);
        return done;
      } catch (error) {
        if (this.#closed) throw error;
        if (!(error instanceof Away)) {
          this.#isAway(null);
          throw error;
        }
        const seconds = Math.max(pause, Math.min(error.seconds, 60));
        this.#isAway(error.message);
        await this.#rest(seconds);
      }
    }
  }

  #isAway(away) {
    if (this.away === away) return;
    this.away = away;
    this.#changed();
  }

  #rest(seconds) {
    return new Promise((resolve) => {
      const wake = () => {
        clearTimeout(timer);
        this.#resting.delete(wake);
        resolve();
      };
      const timer = setTimeout(wake, 1000 * seconds);
      this.#resting.add(wake);
    });
  }

  #step(work) {
    this.#last = this.#last.then(async () => {
      const before = this.task?.version;
      try {
        await this.patiently(work);
        if (this.#undo.length && this.task?.version !== before) await this.#offerKept();
      } catch (error) {
        if (!(error instanceof Problem || error instanceof Away)) console.error(error);
        this.#fire("problem", error.message);
      }
      this.#changed();
    });
    return this.#last;
  }

  // The service keeps only so many versions. What it has let go of is not offered to be gone back to.
  async #offerKept() {
    const found = await api.versions(this.name).catch(() => null);
    const kept = found?.items.map(({ version }) => version);
    if (kept) this.#undo = this.#undo.filter(({ version }) => kept.includes(version));
  }

  #fire(type, detail) {
    if (this.#closed && type !== "problem") return;
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #changed() {
    this.#fire("change");
  }

  #refuse(box, photo, why) {
    box.drop(photo);
    this.note(box, `${photo.name}: ${why}`);
  }

  #mayLose(box) {
    if (this.boxes.filter((other) => other !== box && other.held.length).length >= 2) return true;
    this.note(box, "A task needs two classes, and this is one of them: add another photo here before you take this away.");
    return false;
  }

  // Sends what waits. The first time that two boxes have a photo, that makes the task.
  async #send() {
    let most = BATCH.photos; // in one request; fewer where the service has found these too many
    let goesOn = false; // whether some were learned already, of which an undo is offered
    for (;;) {
      for (const box of this.#all) box.photos = box.photos.filter(({ gone, state }) => !gone || state !== "waiting");
      const waiting = this.#all.flatMap((box) => box.photos.map((photo, place) => ({ box, photo, place })));
      const items = waiting
        .filter(({ photo }) => photo.state === "waiting")
        .map((item) => ({ ...item, label: item.box.label, blob: item.photo.blob }))
        .sort((a, b) => a.place - b.place); // so that the first request has photos of every class
      const classes = new Set(items.map(({ label }) => label)).size;
      if (!items.length || (!this.task && classes < 2)) return;
      let bytes = 0;
      const fits = ({ blob }, index) => index < classes || (bytes += blob.size) < BATCH.bytes;
      const stop = items.findIndex((item, index) => index >= most || !fits(item, index));
      const batch = stop < 0 ? items : items.slice(0, stop);
      const { learned, tooMuch } = await this.#sendBatch(batch, goesOn);
      goesOn ||= learned;
      if (!tooMuch) continue;
      const least = this.task ? 1 : classes;
      if (batch.length > least) most = Math.max(least, Math.ceil(batch.length / 2));
      else this.#fail(items, tooMuch); // there is no room for one more
    }
  }

  async #sendBatch(batch, goesOn) {
    const before = this.task?.version;
    for (const { photo, label, blob } of batch) {
      photo.state = "sending";
      photo.id = await exampleId(label, blob);
    }
    this.#changed();
    let task;
    try {
      task = this.task ? await api.add(this.name, batch) : await this.#create(batch);
    } catch (error) {
      const culprit = batch[error.index]; // left out, and the others are sent again
      const tooMuch = error.status === 413 && !culprit ? error : null;
      for (const { photo } of batch) photo.state = "waiting";
      if (error instanceof Away) throw error;
      if (culprit) this.#refuse(culprit.box, culprit.photo, error.message);
      else if (!tooMuch && !this.#lost(error)) this.#fail(batch, error);
      return { learned: false, tooMuch };
    }
    for (const { index, code, detail } of task.rejected ?? []) {
      if (batch[index] && code !== "duplicate_example") this.#refuse(batch[index].box, batch[index].photo, detail);
    }
    const learned = new Set(task.examples.map(({ id }) => id));
    for (const { box, photo } of batch) {
      const other = this.#seen.get(photo.id);
      if (!learned.has(photo.id)) box.drop(photo);
      else if (other && other !== photo && this.#photos.includes(other)) {
        this.#refuse(box, photo, "This very picture is in the box already.");
      } else this.#seen.set(photo.id, photo);
    }
    const what = `${plural(batch.filter(({ box, photo }) => box.photos.includes(photo)).length, "photo")} added`;
    if (before !== undefined && task.version !== before && !goesOn) this.#undo.push({ version: before, what });
    this.#adopt(task);
    this.#fire("said", `${what}. ${task.report?.advice ?? ""}`);
    return { learned: true, tooMuch: null };
  }

  #fail(items, error) {
    for (const { photo } of items) photo.state = "failed";
    for (const box of new Set(items.map((item) => item.box))) this.note(box, error.message, true);
  }

  async #create(batch) {
    for (;;) {
      try {
        return await api.create(this.name, batch, { retain: this.retain });
      } catch (error) {
        if (error.status !== 412) throw error;
        // The name is taken: perhaps by this very request, whose answer was lost.
        const task = await api.get(this.name);
        const ids = new Set(task.examples.map(({ id }) => id));
        if (batch.every(({ photo }) => ids.has(photo.id))) return task;
        if (this.chosen) {
          throw new Problem(412, { detail: `A task named "${this.name}" is there already. Choose another name above.` });
        }
        this.name = madeUp();
      }
    }
  }

  // When the task has been deleted elsewhere, it is made anew from what is here.
  #lost(error) {
    if (error.code !== "task_not_found") return false;
    this.task = null;
    this.#undo = [];
    for (const box of this.#all) {
      box.photos = box.photos.filter((photo) => photo.blob);
      for (const photo of box.photos) if (photo.state === "learned") photo.state = "waiting";
    }
    return true;
  }

  async #removeExample(box, photo) {
    if (photo.state !== "learned") box.drop(photo);
    else await this.#take(box, [photo], "1 photo removed", () => api.removeExample(this.name, photo.id));
  }

  #removeClass(box, withBox) {
    const photos = box.shown;
    for (const photo of photos) photo.gone = true;
    box.gone = withBox;
    this.#step(() => this.#take(box, photos, `"${box.label}" removed`, () => api.removeClass(this.name, box.label)));
  }

  async #take(box, photos, what, ask) {
    const before = this.task.version;
    try {
      this.#adopt(await this.#orAsItIs(ask));
    } catch (error) {
      if (error instanceof Away) throw error;
      for (const photo of photos) photo.gone = false;
      box.gone = false;
      this.note(box, error.message);
      return;
    }
    this.#all = this.#all.filter((other) => other !== box || !box.gone);
    if (this.task.version !== before) this.#undo.push({ version: before, what });
    this.#fire("said", `${what}. ${this.task.report?.advice ?? ""}`);
  }

  // What is not there any more has been taken away already, perhaps by a request whose answer was lost.
  async #orAsItIs(ask) {
    try {
      return await ask();
    } catch (error) {
      if (!["example_not_found", "class_not_found"].includes(error.code)) throw error;
      return await api.get(this.name);
    }
  }

  // The photos once more under the new name, then without the former one: two versions, and one undo for both.
  async #relabel(box) {
    const [former, label, before] = [box.label, box.wanted, this.task?.version];
    if (label === null) return; // an earlier step has done this one, too
    const batch = box.held.map((photo) => ({ photo, blob: photo.blob, label }));
    try {
      if (batch.length && label !== former) {
        await api.add(this.name, batch);
        const task = await this.#orAsItIs(() => api.removeClass(this.name, former));
        for (const { photo, blob } of batch) {
          // An undo brings the former name back, and with it the example of that name.
          this.#seen.set(photo.id, Object.assign(new Photo("learned", photo.name), { ...photo }));
          photo.id = await exampleId(label, blob);
          this.#seen.set(photo.id, photo);
        }
        box.label = label;
        box.formerly = former;
        this.#adopt(task);
        this.#undo.push({ version: before, what: `"${former}" renamed` });
      }
      box.label = label;
    } catch (error) {
      if (error instanceof Away) throw error;
      this.note(box, error.message);
    }
    if (box.wanted === label) box.wanted = null; // another may have been typed meanwhile
  }

  // The boxes as the task has them now; what is not sent yet stays where it is.
  #adopt(task) {
    this.task = task;
    const labels = new Map(task.examples.map(({ id, label }) => [id, label]));
    for (const box of this.#all) {
      box.photos = box.photos.filter((photo) => photo.state !== "learned" || labels.get(photo.id) === box.label);
    }
    for (const [id, label] of labels) {
      const box = this.#boxOf(label);
      const photo = this.#seen.get(id) ?? new Photo("learned");
      this.#seen.set(id, photo);
      if (!box.photos.includes(photo)) {
        photo.gone = false;
        box.photos.push(photo);
      }
      Object.assign(photo, { id, state: "learned" });
    }
    for (const box of this.#all) box.photos.sort((a, b) => a.order - b.order);
    this.#fire("task");
    this.#changed();
  }

  #boxOf(label) {
    const found =
      this.#all.find((box) => box.label === label) ??
      this.#all.find((box) => !box.photos.length && (box.label === "" || box.formerly === label));
    const box = found ?? this.addBox();
    box.label = label;
    return box;
  }

  // Photos that the service keeps are shown; of others only their names are left.
  #showKept() {
    if (!this.task.retained) return;
    const bare = [...this.#seen.values()].filter((photo) => !photo.blob);
    inTurn(bare, 4, async (photo) => {
      photo.show(await api.image(this.name, photo.id));
      this.#changed();
    }).catch((error) => this.#fire("problem", error.message));
  }
}

const unlessAway = (instead) => (error) => {
  if (error instanceof Away) throw error;
  return instead;
};

// Works on all items, `width` of them at a time.
async function inTurn(items, width, work) {
  let next = 0;
  const worker = async () => {
    while (next < items.length) {
      const index = next++;
      await work(items[index], index);
    }
  };
  await Promise.all(Array.from({ length: width }, worker));
}
