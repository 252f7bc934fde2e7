// Renders a model card's Markdown as elements: headings, lists, tables, code and text, which is all that cards use.

const KINDS = [
  [/^```/, code],
  [/^#/, heading],
  [/^\|/, table],
  [/^- /, list],
];

export function elements(markdown) {
  const lines = markdown.split("\n");
  const made = [];
  while (lines.length) {
    const kind = KINDS.find(([begins]) => begins.test(lines[0]));
    if (kind) made.push(kind[1](lines));
    else if (lines[0].trim()) made.push(filled("p", lines.shift()));
    else lines.shift();
  }
  return made;
}

function heading(lines) {
  const line = lines.shift();
  return filled(line.startsWith("##") ? "h4" : "h3", line.replace(/^#+ /, ""));
}

function code(lines) {
  lines.shift();
  const pre = document.createElement("pre");
  pre.textContent = taken(lines, (line) => !line.startsWith("```")).join("\n");
  lines.shift();
  return pre;
}

function list(lines) {
  const items = taken(lines, (line) => line.startsWith("- "));
  return holding("ul", items.map((line) => filled("li", line.slice(2))));
}

function table(lines) {
  const [head, , ...rows] = taken(lines, (line) => line.startsWith("|"));
  const top = holding("thead", [row(head, "th")]);
  const whole = holding("table", [top, holding("tbody", rows.map((line) => row(line, "td")))]);
  return holding("div", [whole], "scrolls");
}

function row(line, cell) {
  const cells = line.trim().slice(1, -1).split(/(?<!\\)\|/);
  return holding("tr", cells.map((text) => filled(cell, text.trim())));
}

function taken(lines, wanted) {
  const end = lines.findIndex((line) => !wanted(line));
  return lines.splice(0, end < 0 ? lines.length : end);
}

function filled(tag, text) {
  const parts = text.split(/(\*\*.+?\*\*)/);
  return holding(tag, parts.map((part) => (part.startsWith("**") ? filled("strong", part.slice(2, -2)) : plain(part))));
}

// Unescapes clients' texts: a class name may contain any character.
const plain = (text) => document.createTextNode(text.replace(/\\([!-/:-@[-`{-~])/g, "$1"));

function holding(tag, children, name = "") {
  const element = document.createElement(tag);
  element.className = name;
  element.append(...children);
  return element;
}
