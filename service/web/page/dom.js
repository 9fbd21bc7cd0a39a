// Small helpers to make and keep elements. Knows nothing of tasks.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function button(label, { picture = null, only = false, ...attributes } = {}) {
  const name = only ? { "aria-label": label, title: label } : {};
  return el("button", { type: "button", ...name, ...attributes }, picture && icon(picture), only ? null : label);
}

// Writes only what differs, so that a screen reader is not told the same again.
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// One element per item, made once and kept, so that focus and pictures survive a change of the list.
export function list(parent, create, update) {
  const made = new Map();
  return (items) => {
    const wanted = new Set(items);
    for (const [item, node] of made) {
      if (wanted.has(item)) continue;
      node.remove();
      made.delete(item);
    }
    for (const item of items) if (!made.has(item)) made.set(item, create(item));
    let at = parent.firstElementChild;
    items.forEach((item, index) => {
      const node = made.get(item);
      update(node, item, index);
      if (node === at) at = at.nextElementSibling;
      else parent.insertBefore(node, at);
    });
  };
}

export function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

// Within a sentence.
export function small(text) {
  return text[0].toLowerCase() + text.slice(1);
}

export function percent(share) {
  return `${Math.round(100 * share)} %`;
}
