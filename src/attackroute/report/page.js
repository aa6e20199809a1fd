// What the page does besides the route view: its data as a file.
function fillData() {
  const text = () => JSON.stringify(data, null, 1);
  byId("json-details").addEventListener("toggle", () => { byId("json").textContent = text(); }, { once: true });
  byId("save-json").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text()], { type: "application/json" }));
    link.download = "attackroute-report.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  byId("save-json").hidden = false;
}

const data = JSON.parse(document.getElementById("data").textContent);
fillData();
if (data.route_view) routeView(data.route_view);
