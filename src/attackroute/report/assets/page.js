// What the page does besides the route views: its data and its figures as files.

const PAPER = 8;  // layers side by side on paper
const TITLE = 48;  // height of what stands over a saved drawing
const INK = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-family", "font-size", "font-weight", "text-anchor"];  // what the page's style decides

function save(content, name) {
  const link = html("a", undefined, { download: name, href: typeof content === "string" ? content : URL.createObjectURL(content) });
  link.click();
  if (typeof content !== "string") setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function inked(svg) {  // a copy that looks the same without the page
  const copy = svg.cloneNode(true), before = svg.querySelectorAll("*"), after = copy.querySelectorAll("*");
  before.forEach((item, index) => {
    const style = getComputedStyle(item);
    for (const name of INK) after[index].setAttribute(name, style.getPropertyValue(name));
    if (item.classList.contains("target")) after[index].setAttribute("fill", "none");
  });
  return copy;
}

function standalone(v) {  // the drawing with what it shows, the attack and the legend over it
  const copy = inked(v.svg), body = getComputedStyle(document.body), [width, height] = ["width", "height"].map((name) => Number(v.svg.getAttribute(name)));
  const words = { "font-family": body.fontFamily, "font-size": 12, fill: body.color };
  copy.prepend(drawn("rect", { y: -TITLE, width, height: height + TITLE, fill: body.backgroundColor }));
  copy.append(drawn("text", { x: 8, y: 16 - TITLE, ...words }, `${document.querySelector("h1").textContent}. ${v.part("says").textContent}`));
  let at = 8;
  for (const item of v.root.querySelectorAll(".legend li:not([hidden])")) {
    if (!item.querySelector("svg")) continue;
    const mark = inked(item.querySelector("svg"));
    for (const [name, value] of Object.entries({ x: at, y: 25 - TITLE, width: 14, height: 14 })) mark.setAttribute(name, value);
    copy.append(mark, drawn("text", { x: at + 20, y: 36 - TITLE, ...words }, item.textContent.trim()));
    at += 44 + 7 * item.textContent.trim().length;
  }
  copy.setAttribute("viewBox", `0 ${-TITLE} ${width} ${height + TITLE}`);
  copy.setAttribute("height", height + TITLE);
  copy.setAttribute("xmlns", v.svg.namespaceURI);
  return new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" });
}

function savePng(source, width, height, name) {
  const image = new Image();
  image.addEventListener("load", () => {
    const canvas = html("canvas", undefined, { width: 2 * width, height: 2 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
    canvas.toBlob((blob) => save(blob, name), "image/png");
  });
  image.src = source;
}

function asAddress(blob, use) {
  const reader = new FileReader();
  reader.addEventListener("load", () => use(reader.result));
  reader.readAsDataURL(blob);
}

function layOutOnPaper() {  // a wide drawing in strips below one another, since paper does not scroll
  for (const v of views) {
    const strip = PAPER * v.column, width = Number(v.svg.getAttribute("width")), strips = [];
    const height = v.height, wanted = width > 1.3 * strip ? Math.ceil(width / strip) : 0;
    for (let at = 0; at < wanted; at++) {
      const copy = v.svg.cloneNode(true);
      copy.setAttribute("viewBox", `${at * strip} 0 ${strip + LEFT} ${height}`);
      copy.removeAttribute("width");
      copy.removeAttribute("height");
      strips.push(copy);
    }
    v.part("paper").replaceChildren(...strips);
    v.part("scroll").classList.toggle("split", wanted > 0);
  }
}

function button(text, act) {
  const made = html("button", text, { type: "button", class: "save" });
  made.addEventListener("click", act);
  return made;
}

function offerFiles() {
  for (const figure of document.querySelectorAll("figure")) {
    const image = figure.querySelector("img"), name = figure.dataset.title, vector = image.src.startsWith("data:image/svg");
    const row = html("figcaption");
    if (vector) row.append(button("SVG", () => save(image.src, `${name}.svg`)));
    row.append(button("PNG", () => (vector ? savePng(image.src, image.naturalWidth, image.naturalHeight, `${name}.png`) : save(image.src, `${name}.png`))));
    figure.append(row);
  }
  for (const [number, v] of views.entries()) {
    const name = `route${number ? `-${number + 1}` : ""}`;
    v.part("files").append(
      button("Drawing as SVG", () => save(standalone(v), `${name}.svg`)),
      button("as PNG", () => asAddress(standalone(v), (source) => savePng(source, v.svg.clientWidth, v.svg.clientHeight + TITLE, `${name}.png`))),
    );
  }
}

function offerData(data) {
  const text = () => JSON.stringify(data, null, 1);
  document.getElementById("json-details").addEventListener("toggle", () => { document.getElementById("json").textContent = text(); }, { once: true });
  const saving = document.getElementById("save-json");
  saving.addEventListener("click", () => save(new Blob([text()], { type: "application/json" }), "attackroute-report.json"));
  saving.hidden = false;
}

const pageData = JSON.parse(document.getElementById("data").textContent);
openViews(pageData);
offerFiles();
addEventListener("beforeprint", layOutOnPaper);
addEventListener("afterprint", () => { for (const v of views) v.part("paper").replaceChildren(); });
offerData(pageData);
