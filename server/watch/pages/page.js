// The live page: takes the server's messages, keeps the runs they tell of, and draws them.
import { CellMap, Chart, counted, element, styleOf, swatch } from "./charts.js";
import { Activity, ClientPanel } from "./clients.js";

const DRAW_MS = 250;
const MOST_EVENTS = 200;
const STATES = {
  starting: "starting", running: "going on", complete: "complete",
  interrupted: "interrupted", stopped: "not running", fault: "cannot be read",
};
const byId = (id) => document.getElementById(id);

// --- numbers in words

const isNumber = (value) => typeof value === "number";
// On an axis with as many digits as its lines need, which are `step` apart.
const percent = (value, step) => `${(100 * value).toFixed(step ? Math.max(0, Math.ceil(-Math.log10(100 * step) - 1e-9)) : 1)} %`;

function plain(value) {
  if (value !== 0 && (Math.abs(value) < 0.01 || Math.abs(value) >= 1e5)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let step = 0;
  while (Math.abs(bytes) >= 1000 && step < units.length - 1) [bytes, step] = [bytes / 1000, step + 1];
  return `${step ? Number(bytes.toPrecision(3)) : Math.round(bytes)} ${units[step]}`;
}

function duration(seconds) {
  if (seconds < 59.5) return `${seconds < 9.95 && seconds % 1 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

// --- the runs

class Run {
  constructor(key) {
    this.key = key;
    this.about = null;
    this.state = "starting";
    this.fault = "";
    this.reset();
  }

  reset() {
    this.rounds = [];
    this.evaluations = [];
    this.events = [];
    this.failures = 0;
    this.traffic = null;
    this.began = null;
    this.end = null;
    this.taskStarts = [];
    // A record that is read anew tells nothing new of who is at work now.
    this.activity ??= new Activity();
  }

  get isReal() { return this.activity.isReal; }
  get latest() { return this.rounds[this.rounds.length - 1]; }
  get scored() { return this.evaluations[this.evaluations.length - 1]; }
  get method() { return this.key === "." ? this.about?.learner ?? "run" : this.key.replace(/-seed\d+$/, ""); }
  get name() { return this.key === "." ? this.method : this.key; }
  get share() { return this.state === "complete" ? 1 : this.latest?.share ?? 0; }

  take(message) {
    switch (message.type) {
      case "run":
        this.about = message;
        this.fault = "";
        break;
      case "reset": this.reset(); break;
      case "state": this.state = message.state; break;
      case "fault": this.fault = message.reason; break;
      case "start": this.began ??= message.time; break;
      case "round": this.takeRound(message); break;
      case "evaluation": this.evaluations.push(message); break;
      case "failure":
        this.failures += 1;
        this.activity.take(message);
        this.note(message);
        break;
      case "warning": case "forgotten": this.note(message); break;
      case "interrupted": case "end":
        if (message.type === "end") this.end = message;
        this.activity.take(message);
        break;
      case "fleet":
        this.activity.take({ type: "devices", names: message.clients.map((each) => each.device) });
        break;
      default: this.activity.take(message);
    }
    if (message.traffic) this.traffic = message.traffic;
  }

  takeRound(message) {
    if (this.latest?.task !== message.task) this.taskStarts.push(message);
    this.rounds.push(message);
  }

  note(message) {
    this.events.push(message);
    if (this.events.length > MOST_EVENTS) this.events.shift();
  }
}

const runs = new Map();
let folder = "";
let isOver = false;
let trouble = "";
const spokenOf = { text: "" };

function take(message) {
  switch (message.type) {
    case "hello":
      runs.clear();
      folder = message.folder;
      break;
    case "trouble":
      trouble = message.reason;
      break;
    case "bye":
      isOver = true;
      break;
    default: {
      const { run: key } = message;
      if (!runs.has(key)) runs.set(key, new Run(key));
      runs.get(key).take(message);
    }
  }
}

// --- curves

const AXES = {
  round: { of: (message) => message.at, write: (x, isShort) => (isShort ? plain(x) : `round ${plain(x)}`) },
  time: { of: (message, run) => (run.began && message.time ? message.time - run.began : null), write: duration },
  virtual: { of: (message) => message.virtual_seconds ?? null, write: duration },
};
const along = byId("along");
const chartsParent = byId("charts");
const charts = {
  accuracy: new Chart(chartsParent, "Accuracy", "Mean over clients and the tasks so far, on test samples.", percent, 1),
  global: new Chart(chartsParent, "Accuracy of the global model", "Without the parts that clients keep to themselves.", percent, 1),
  forgetting: new Chart(chartsParent, "Forgetting", "Accuracy that was lost on earlier tasks.", percent, 1),
  loss: new Chart(chartsParent, "Training loss", "Mean over the clients of each round.", plain),
  traffic: new Chart(chartsParent, "Traffic of training", "Bytes of the run so far, all clients together.", size),
  energy: new Chart(chartsParent, "Energy", "Of all devices, from the start.", (value) => (value < 1000 ? `${plain(value)} J` : `${plain(value / 1000)} kJ`)),
};
const taskMap = new CellMap(chartsParent, "Accuracy on each task", "One row a task, one column an evaluation.", false);
const panel = new ClientPanel();

function points(run, messages, value) {
  const axis = AXES[along.value].of;
  const found = [];
  for (const message of messages) {
    const [x, y] = [axis(message, run), value(message)];
    if (isNumber(x) && isNumber(y)) found.push([x, y]);
  }
  return found;
}

function lines(all, value, kind, styles) {
  return all.map((run) => ({ name: run.name, style: styles.get(run.method), points: points(run, run[kind], value) }));
}

function showCurves(all, chosen) {
  const isAlone = all.length === 1;
  const styles = new Map([...new Set(all.map((run) => run.method))].map((method, index) => [method, styleOf(index)]));
  const marks = chosen ? points(chosen, chosen.taskStarts, () => 0).map(([x]) => x) : [];
  const write = AXES[along.value].write;
  const accuracy = lines(all, (message) => message.accuracy, "evaluations", styles);
  const global = lines(all, (message) => message.accuracy_global, "evaluations", styles);
  if (isAlone) {
    const both = [{ ...accuracy[0], name: "clients' models" }, { ...global[0], name: "global model", style: "c1 d1" }];
    charts.accuracy.show(both, marks, write);
  } else {
    charts.accuracy.show(accuracy, marks, write);
  }
  charts.global.show(isAlone ? [] : global, marks, write);
  charts.forgetting.show(lines(all, (message) => message.forgetting, "evaluations", styles), marks, write);
  charts.loss.show(lines(all, (message) => message.loss, "rounds", styles), marks, write);
  charts.energy.show(lines(all, (message) => message.energy_joules, "rounds", styles), marks, write);
  if (isAlone) {
    const ways = [["up", "up, to the server", "c0"], ["down", "down, to clients", "c1 d1"]];
    charts.traffic.show(
      ways.map(([way, name, style]) => ({ name, style, points: points(all[0], all[0].rounds, (message) => message.traffic?.[way]) })),
      marks, write,
    );
  } else {
    charts.traffic.show(lines(all, (message) => message.traffic && message.traffic.up + message.traffic.down, "rounds", styles), marks, write);
  }
  showTaskMap(chosen);
  const legend = byId("legend");
  legend.hidden = isAlone;
  legend.replaceChildren(...[...styles].map(([method, style]) => {
    const item = element("li");
    item.append(swatch(style), method);
    return item;
  }));
}

function mixed(low, high, share) {
  return `color-mix(in oklab, ${low}, ${high} ${Math.round(100 * share)}%)`;
}

function showTaskMap(run) {
  const evaluations = run?.evaluations.filter((each) => each.per_task?.length) ?? [];
  const tasks = run?.about?.tasks ?? 0;
  const value = (row, column) => evaluations[column].per_task[row];
  const last = evaluations[evaluations.length - 1];
  taskMap.show({
    rows: evaluations.length ? [...Array(tasks).keys()].map((task) => `task ${task + 1}`) : [],
    columns: evaluations,
    colour: (row, column, style) => {
      const share = value(row, column);
      if (!isNumber(share)) return style.getPropertyValue("--none");
      return mixed(style.getPropertyValue("--low"), style.getPropertyValue("--high"), share);
    },
    tell: (row, column) => {
      const share = value(row, column);
      const { task, round } = evaluations[column];
      return `task ${row + 1}, after round ${round} of task ${task + 1}: ${isNumber(share) ? percent(share) : "not learned yet"}`;
    },
    about: last && tasks <= 12 ? `Now: ${last.per_task.map((share, task) => `task ${task + 1} ${isNumber(share) ? percent(share) : "–"}`).join(" · ")}` : "",
    label: last ? `Accuracy on each task now: ${last.per_task.map((share, task) => `task ${task + 1} ${isNumber(share) ? percent(share) : "unknown"}`).join(", ")}` : "Accuracy on each task",
  });
}

// --- the state of things

function stateOf(run) {
  return run.fault ? "fault" : run.state;
}

function bar(host, share, state) {
  host.className = `bar ${state}`;
  host.setAttribute("aria-valuenow", Math.round(100 * share));
  host.firstElementChild.style.width = `${100 * share}%`;
}

function placeOf(run) {
  const { latest, about } = run;
  if (run.fault) return run.fault;
  if (!latest) return run.state === "starting" || run.state === "running" ? "No round is done yet." : "No round was done.";
  const parts = [`Task ${latest.task + 1} of ${about?.tasks ?? "?"}, round ${latest.round} done`];
  if (run.state === "running") parts.push(isNumber(latest.seconds_left) ? `about ${duration(latest.seconds_left)} left` : "time left not known yet");
  if (run.state === "complete" && run.end) parts.push(`it took ${duration(run.end.seconds)}`);
  if (run.state === "interrupted") parts.push("interrupted; go on with --resume");
  if (run.state === "stopped") parts.push("no process of this machine runs it; go on with --resume");
  return parts.join(" · ");
}

function cardsOf(run) {
  const { latest, scored, traffic } = run;
  const cards = [];
  const add = (title, text, isBad = false) => cards.push([title, text, isBad]);
  if (scored) {
    add("Accuracy", percent(scored.accuracy));
    if (isNumber(scored.accuracy_global)) add("Accuracy, global model", percent(scored.accuracy_global));
    add("Forgetting", isNumber(scored.forgetting) ? percent(scored.forgetting) : "–");
  }
  if (latest) {
    add("Task and round", `${latest.task + 1} / ${latest.round}`);
    if (run.state === "running" && isNumber(latest.seconds_left)) add("Time left, about", duration(latest.seconds_left));
    add("A round takes", duration(latest.seconds));
    add("Clients in the last round", String(latest.clients));
    if (isNumber(latest.virtual_seconds)) add("Virtual time", duration(latest.virtual_seconds));
    if (isNumber(latest.peak_memory_mb)) add("Peak memory", size(1e6 * latest.peak_memory_mb));
  }
  if (traffic) {
    add("Training traffic, up / down", `${size(traffic.up)} / ${size(traffic.down)}`);
    add("Traffic of scoring", size(traffic.scoring));
  }
  add("Failures", String(run.failures), run.failures > 0);
  return cards;
}

function showCards(run) {
  byId("cards").replaceChildren(...cardsOf(run).map(([title, text, isBad]) => {
    const card = element("div", isBad ? { class: "bad" } : {});
    card.append(element("dt", {}, title), element("dd", {}, text));
    return card;
  }));
}

function showRuns(all) {
  const table = element("table");
  table.append(element("caption", {}, "Runs side by side"));
  const head = element("tr");
  for (const name of ["Run", "State", "Progress", "Accuracy", "Global model", "Forgetting", "Time left", "Traffic", "Failures"]) head.append(element("th", { scope: "col" }, name));
  const top = element("thead");
  top.append(head);
  const body = element("tbody");
  for (const run of all) {
    const { scored, latest, traffic } = run;
    const row = element("tr");
    const state = stateOf(run);
    row.append(element("th", { scope: "row" }, run.name));
    const pill = element("td");
    pill.append(element("span", { class: `pill ${state}` }, STATES[state]));
    const progress = element("td");
    const track = element("div", { role: "progressbar", "aria-label": `Progress of ${run.name}`, "aria-valuemin": "0", "aria-valuemax": "100" });
    track.append(element("div"));
    bar(track, run.share, state);
    progress.append(track);
    row.append(pill, progress);
    const isGoing = run.state === "running" && isNumber(latest?.seconds_left);
    const texts = [
      scored ? percent(scored.accuracy) : "–",
      isNumber(scored?.accuracy_global) ? percent(scored.accuracy_global) : "–",
      isNumber(scored?.forgetting) ? percent(scored.forgetting) : "–",
      isGoing ? duration(latest.seconds_left) : "–",
      traffic ? size(traffic.up + traffic.down) : "–",
      String(run.failures),
    ];
    for (const text of texts) row.append(element("td", {}, text));
    body.append(row);
  }
  table.append(top, body);
  byId("runs").replaceChildren(table);
}

function showEvents(all) {
  const entries = all.flatMap((run) => run.events.map((message) => [run, message]));
  entries.sort(([, one], [, other]) => (other.time ?? 0) - (one.time ?? 0));
  byId("no-events").hidden = entries.length > 0;
  const list = byId("events");
  list.hidden = !entries.length;
  list.replaceChildren(...entries.slice(0, MOST_EVENTS).map(([run, message]) => {
    const item = element("li", { class: message.type });
    const parts = [];
    if (all.length > 1) parts.push(run.name);
    if (isNumber(message.task)) parts.push(`task ${message.task + 1}`);
    if (isNumber(message.round)) parts.push(`round ${message.round}`);
    if (isNumber(message.client)) parts.push(`client ${message.client}`);
    const word = { failure: "failed", warning: "warning", forgotten: "begins anew" }[message.type];
    item.append(element("b", {}, word), ` ${parts.join(", ")}: ${message.reason}`);
    return item;
  }));
}

// The run whose clients are shown: the chosen one, else the one that goes on, else the last.
function chosenRun(all) {
  const select = byId("chosen");
  const chosen = runs.get(select.value);
  if (chosen && select.dataset.isPicked) return chosen;
  return all.find((run) => run.state === "running") ?? all[all.length - 1];
}

function showChoice(all, chosen) {
  byId("choice").hidden = all.length < 2;
  const select = byId("chosen");
  const names = all.map((run) => run.name).join("\n");
  if (select.dataset.names !== names) {
    select.dataset.names = names;
    select.replaceChildren(...all.map((run) => element("option", { value: run.key }, run.name)));
  }
  select.value = chosen.key;
}

// Only what a listener would want to be interrupted for: the end of a task, failures, the end.
function speak(run, all) {
  const { scored } = run;
  const parts = [];
  if (scored) parts.push(`After task ${scored.task + 1}: accuracy ${percent(scored.accuracy)}.`);
  if (run.failures) parts.push(`${counted(run.failures, "failure")}.`);
  if (run.state === "complete") parts.push("The run is complete.");
  const text = all.length === 1 ? parts.join(" ") : `${all.filter((each) => each.state === "complete").length} of ${all.length} runs are complete.`;
  if (text === spokenOf.text) return;
  spokenOf.text = text;
  byId("spoken").textContent = text;
}

function showHead(all, run) {
  const isAlone = all.length === 1;
  const { about } = run;
  const state = all.some((each) => each.state === "running") ? "running" : stateOf(run);
  const name = about?.experiment ?? folder.split("/").pop();
  byId("title").textContent = isAlone ? `${name} with ${run.method}` : `${name}: ${all.length} runs`;
  byId("state").className = `pill ${state}`;
  byId("state").textContent = STATES[state];
  if (about) {
    const facts = [counted(about.clients, "client"), `${counted(about.tasks, "task")} of ${counted(about.rounds, "round")}`, about.data, about.model, about.strategy];
    if (isAlone) facts.push(`seed ${about.seed}`);
    byId("about").textContent = facts.join(" · ");
  }
  const share = all.reduce((sum, each) => sum + each.share, 0) / all.length;
  document.title = `${Math.round(100 * share)} % · ${name}`;
  bar(byId("progress"), share, state);
  byId("progress").setAttribute("aria-valuetext", `${Math.round(100 * share)} %, ${STATES[state]}`);
  byId("place").textContent = isAlone ? placeOf(run) : `${all.filter((each) => each.state === "complete").length} of ${all.length} runs are complete · ${run.name}: ${placeOf(run)}`;
}

function draw() {
  byId("folder").textContent = folder;
  const all = [...runs.values()];
  if (!all.length) {
    byId("title").textContent = "Waiting for a run";
    byId("about").textContent = `There is no run in ${folder} yet. This page shows it as soon as it begins.`;
    byId("no-events").hidden = false;
    showCurves([], null);
    return;
  }
  const chosen = chosenRun(all);
  const hasVirtual = all.some((run) => isNumber(run.latest?.virtual_seconds));
  const option = along.querySelector('[value="virtual"]');
  option.hidden = option.disabled = !hasVirtual;
  showHead(all, chosen);
  showCards(chosen);
  byId("cards").hidden = all.length > 1;
  byId("runs").hidden = all.length < 2;
  if (all.length > 1) showRuns(all);
  showCurves(all, chosen);
  showChoice(all, chosen);
  panel.show(chosen);
  showEvents(all);
  speak(chosen, all);
}

let isDue = false;
function drawSoon() {
  if (isDue) return;
  isDue = true;
  setTimeout(() => {
    isDue = false;
    draw();
  }, DRAW_MS);
}

// --- the connection

function sayConnection(text) {
  const place = byId("connection");
  place.hidden = !text;
  if (place.textContent !== text) place.textContent = text;
}

const source = new EventSource("events");
source.onopen = () => sayConnection("");
source.onerror = () => {
  if (!isOver) sayConnection("The connection is lost; trying again. The curves are as of the last message.");
};
source.onmessage = (event) => {
  take(JSON.parse(event.data));
  if (isOver) {
    source.close();
    sayConnection("The command that served this page has ended. It stays as it is now; the report has it all.");
  } else {
    sayConnection(trouble && `The folder cannot be read just now: ${trouble}`);
  }
  drawSoon();
};
along.addEventListener("change", draw);
byId("chosen").addEventListener("change", (event) => {
  event.target.dataset.isPicked = "1";
  draw();
});
