// Answers in this browser: the task's exported model, run by onnxruntime-web, without asking the service.
//
// Loaded only when the switch is used. Pictures are cut and scaled as models/images.py does it, so that both give the
// same answer but for what their JPEG decoders differ in.

import * as api from "./api.js";

const FOLDER = new URL("offline/", document.baseURI).href;
const MODULE = `${FOLDER}ort.wasm.min.mjs`;

export async function offered() {
  return (await fetch(MODULE, { method: "HEAD" })).ok;
}

export class Offline {
  #ort = null;
  #input = null; // {height, width, channels}
  #model = null; // {head, session, reject}

  // Loads what a task needs; after that the network may be gone. Raises with a sentence when it cannot.
  async load(task) {
    if (this.#model?.head === task.head) return this.#model;
    if (!this.#ort) {
      const ort = await import(MODULE);
      ort.env.wasm.wasmPaths = FOLDER;
      ort.env.wasm.numThreads = 1;
      this.#input = (await api.artifact()).input;
      this.#ort = ort;
    }
    const bytes = new Uint8Array(await (await api.exported(task.task)).arrayBuffer());
    const session = await this.#ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    this.#model?.session.release?.();
    this.#model = { head: task.head, session, reject: rejectOf(bytes) };
    return this.#model;
  }

  async classify(task, blob) {
    const { session, reject } = await this.load(task);
    const { height, width, channels } = this.#input;
    const pixels = await pixelsOf(blob, this.#input);
    const answer = await session.run({ pixels: new this.#ort.Tensor("uint8", pixels, [1, height, width, channels]) });
    const shares = [...answer.probabilities.data];
    const best = shares.indexOf(Math.max(...shares));
    const known = answer.known?.data[0] ?? null;
    return {
      label: known !== null && known < reject ? null : task.classes[best].label,
      probability: shares[best],
      probabilities: Object.fromEntries(task.classes.map(({ label }, index) => [label, shares[index]])),
      known,
    };
  }
}

// Below which `known` a picture is none of these, from the facts at the end of the file; the runtime does not read them.
function rejectOf(model) {
  const facts = new TextDecoder("latin1").decode(model.subarray(-100_000));
  return Number(/\x0a\x06reject\x12.([0-9.e-]+)/s.exec(facts)?.[1] ?? 0.05);
}

// Upright, on white, the shorter side to the target, the middle of it: uint8 [height, width, channels].
async function pixelsOf(blob, input) {
  // Colours as they stand in the file: the service does not look at profiles either.
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const canvas = document.createElement("canvas");
  const { width, height } = Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
  const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  const depth = input.channels;
  const image = new Uint8Array(width * height * depth);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = data.subarray(4 * i, 4 * i + 3);
    if (depth === 1) image[i] = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16;
    else image.set([r, g, b], 3 * i);
  }
  return cover(image, width, height, input);
}

function cover(image, width, height, { width: across, height: down, channels: depth }) {
  const scale = Math.min(width / across, height / down);
  const columns = weights(width, across, scale);
  const rows = weights(height, down, scale);
  // Rounded to bytes between the two directions, as Pillow does.
  const narrow = new Uint8ClampedArray(height * across * depth);
  for (let y = 0; y < height; y++) {
    columns.forEach(({ from, share }, x) => {
      for (let c = 0; c < depth; c++) {
        let sum = 0;
        for (let k = 0; k < share.length; k++) sum += share[k] * image[depth * (y * width + from + k) + c];
        narrow[depth * (y * across + x) + c] = sum;
      }
    });
  }
  const line = depth * across;
  const small = new Uint8ClampedArray(down * line);
  rows.forEach(({ from, share }, y) => {
    for (let i = 0; i < line; i++) {
      let sum = 0;
      for (let k = 0; k < share.length; k++) sum += share[k] * narrow[line * (from + k) + i];
      small[line * y + i] = sum;
    }
  });
  return new Uint8Array(small.buffer);
}

// A triangle over the pixels that each new one covers, from the middle part of a line.
function weights(size, target, scale) {
  const start = (size - target * scale) / 2;
  const reach = Math.max(1, scale);
  return Array.from({ length: target }, (_, index) => {
    const centre = start + (index + 0.5) * scale;
    const from = Math.max(0, Math.trunc(centre - reach + 0.5));
    const stop = Math.min(size, Math.trunc(centre + reach + 0.5));
    const share = [];
    for (let x = from; x < stop; x++) share.push(Math.max(0, 1 - Math.abs((x - centre + 0.5) / reach)));
    const total = share.reduce((a, b) => a + b, 0);
    return { from, share: share.map((value) => value / total) };
  });
}
