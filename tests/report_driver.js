// Uses the page as a reader would, and tells its parent what happened.
(async () => {
  const told = { errors: [] };
  addEventListener("error", (event) => told.errors.push(String(event.message)));
  const svg = document.getElementById("route-svg"), panel = document.getElementById("channel");
  const frames = () => new Promise((done) => setTimeout(done, 150));  // the page draws some 16 ms after a control moves
  const all = (selector) => [...document.querySelectorAll(selector)];
  const nodes = () => all(".node").map((node) => [node.dataset.key, node.getAttribute("class").split(" ")[1]]);
  const at = (key) => document.querySelector(`.node[data-key="${key}"]`);
  const set = async (id, value) => {
    const control = document.getElementById(id);
    control.value = value;
    control.dispatchEvent(new Event("input", { bubbles: true }));
    await frames();
  };
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const active = () => document.activeElement.dataset.key || null;
  try {
    told.background = getComputedStyle(document.body).backgroundColor;
    told.overflow = document.documentElement.scrollWidth - innerWidth;
    told.wide = all("main *").filter((item) => !item.closest(".scroll, .table-box, pre, .hidden") && item.getBoundingClientRect().right > innerWidth + 1).map((item) => item.tagName);
    told.first = nodes();
    told.tabbable = all('.node[tabindex="0"]').length;
    told.skips = all(".skip").length;
    told.edges = all("#edges path").length;
    told.says = document.getElementById("route-says").textContent;
    
    await set("width", "0.5");
    
    told.wider = nodes();
    told.hash = location.hash;
    await set("width", "0.25");
    await set("rows", "200");
    told.every = nodes();
    await set("rows", "20");
    const key = told.first.find(([name]) => name.startsWith("2:"))[0];
    told.key = key;
    at(key).querySelector(".mark").dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    told.hovered = panel.innerText;
    told.picked = all("#picked-edges path").length;
    svg.dispatchEvent(new PointerEvent("pointerleave"));
    told.left = panel.innerText;
    at(key).dispatchEvent(new MouseEvent("click", { bubbles: true }));
    svg.dispatchEvent(new PointerEvent("pointerleave"));
    told.clicked = panel.innerText;
    told.pressed = all('.node[aria-pressed="true"]').map((node) => node.dataset.key);
    told.kept = location.hash;
    await set("influence", "attacked");
    told.attacked = panel.innerText;
    await set("influence", "clean");
    at(key).focus();
    press("Escape");
    told.released = [location.hash, active()];
    press("ArrowDown");
    told.down = active();
    press("ArrowRight");
    told.right = active();
    press("Enter");
    told.entered = [location.hash, active()];
    press("Escape");
    const button = all("#samples button")[1];
    button.click();
    told.sample = { title: button.textContent, pressed: button.getAttribute("aria-pressed"), ringed: all(".node.on-sample").map((node) => node.dataset.key), says: document.getElementById("route-says").textContent };
    button.click();
    told.without = all(".node.on-sample").length;
    await set("search", "conv1 999999");
    told.unfound = document.getElementById("found").textContent;
    await set("search", "layer4.1.conv2 3");
    told.found = [document.getElementById("found").textContent, panel.querySelector("h3").textContent];
    document.getElementById("json-details").open = true;
    await frames();
    await new Promise((done) => setTimeout(done, 50));
    told.json = document.getElementById("json").textContent.length;
  } catch (error) {
    told.errors.push(String(error.stack || error));
  }
  parent.postMessage(JSON.stringify(told), "*");
})();
