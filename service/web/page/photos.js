// A file -> the bytes that go to the service, and the name that the service will give them.
//
// What is large is made small here, and what holds a camera's notes (time, place) is written anew without them: the
// original does not leave the browser. Knows nothing of boxes or tasks.

import { sha256 } from "./sha256.js";

const LONGEST = 640;
const QUALITY = 0.9;
// What goes as it is, unless it has notes: EXIF, XMP or IPTC. They may stand anywhere in a file, and what looks like them
// by chance is only written anew for nothing.
const NOTES = {
  jpeg: /Exif\0|ns\.adobe\.com\/x[am]p\/|Photoshop 3\.0\0/,
  png: /eXIf|XML:com\.adobe\.xmp|Raw profile type /,
  webp: /EXIF|XMP /,
};

// A file that cannot be used; the message says why and what to do.
export class Unusable extends Error {}

export async function prepare(file) {
  let head;
  try {
    head = await textOf(file.slice(0, 65536));
  } catch {
    throw new Unusable("It cannot be read. If it is a folder, open it and drop the photos in it.");
  }
  const kind = kindOf(head);
  if (isAnimated(kind, head)) throw new Unusable("It is animated; save one frame of it as JPEG or PNG.");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Unusable(whyNot(kind, file));
  }
  try {
    const small = Math.max(bitmap.width, bitmap.height) <= LONGEST;
    const asItIs = small && kind in NOTES && !NOTES[kind].test(await textOf(file));
    if (asItIs) return file.slice(0, file.size, `image/${kind}`);
    return await jpeg(bitmap, bitmap.width, bitmap.height);
  } finally {
    bitmap.close();
  }
}

const textOf = async (blob) => new TextDecoder("latin1").decode(await blob.arrayBuffer());

// Draws a picture, or the frame that a video shows, no larger than the service needs it.
export function jpeg(source, width, height) {
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d", { alpha: false });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => {
    const done = (blob) => (blob ? resolve(blob) : reject(new Unusable("The browser cannot make it smaller.")));
    canvas.toBlob(done, "image/jpeg", QUALITY);
  });
}

// The service names an example by its label and its bytes.
export async function exampleId(label, blob) {
  const name = new TextEncoder().encode(`${label}\0`);
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const all = new Uint8Array(name.length + bytes.length);
  all.set(name);
  all.set(bytes, name.length);
  return `ex_${sha256(all).slice(0, 32)}`;
}

function kindOf(head) {
  if (head.startsWith("\u00ff\u00d8")) return "jpeg";
  if (head.slice(1, 4) === "PNG") return "png";
  if (head.slice(8, 12) === "WEBP") return "webp";
  if (head.startsWith("GIF8")) return "gif";
  if (head.slice(4, 8) === "ftyp") return /^(avif|avis)/.test(head.slice(8)) ? "avif" : "heic";
  return head ? "other" : "empty";
}

function isAnimated(kind, head) {
  if (kind === "gif") return head.includes("NETSCAPE2.0");
  if (kind === "webp") return head.slice(12, 16) === "VP8X" && (head.charCodeAt(20) & 2) !== 0;
  if (kind === "png") return head.split("IDAT")[0].includes("acTL");
  return kind === "avif" && head.slice(8, 12) === "avis";
}

function whyNot(kind, file) {
  if (kind === "empty") return "The file is empty.";
  if (kind === "heic" && !file.type.startsWith("video/")) {
    return "This looks like HEIC, which this browser cannot open. Save it as JPEG; on an iPhone: Settings, Camera, Formats, Most Compatible.";
  }
  if (kind === "other" || kind === "heic") return "This is not an image; JPEG, PNG and WEBP work.";
  return "The image is damaged or ends early.";
}
