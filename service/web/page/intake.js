// The ways in which pictures come onto the page: dropped, pasted, chosen. Knows nothing of what becomes of them.

import { button, el } from "./dom.js";

const takers = new Map(); // element -> what takes its files
let latest = null;

// `take` gets the files that are dropped on the element, or pasted while it is under the pointer or has the focus.
export function accepts(node, take) {
  takers.set(node, take);
  node.addEventListener("dragover", (event) => {
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
    node.classList.add("over");
  });
  node.addEventListener("dragleave", (event) => {
    if (!node.contains(event.relatedTarget)) node.classList.remove("over");
  });
  node.addEventListener("drop", (event) => {
    event.preventDefault();
    node.classList.remove("over");
    latest = node;
    take([...event.dataTransfer.files]);
  });
  for (const type of ["focusin", "click"]) node.addEventListener(type, () => (latest = node));
}

export function chooser(text, many, take) {
  const input = el("input", { type: "file", accept: "image/*", multiple: many, hidden: true });
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = "";
  });
  return [button(text, { picture: "photo", onclick: () => input.click() }), input];
}

// A picture that misses its box must not replace the page.
for (const type of ["dragover", "drop"]) window.addEventListener(type, (event) => event.preventDefault());

document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (!files.length) return;
  const here = [...takers.keys()].filter((node) => node.isConnected);
  const node =
    here.find((one) => one.contains(document.activeElement)) ??
    here.find((one) => one.matches(":hover")) ??
    here.find((one) => one === latest) ??
    here[0];
  event.preventDefault();
  takers.get(node)(files);
});
