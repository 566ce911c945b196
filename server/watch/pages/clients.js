// What clients do: from the messages of one run to the states of its clients.
import { CellMap, counted, element } from "./charts.js";

const STATES = [
  ["working", "training"],
  ["idle", "idle"],
  ["failed", "failed"],
  ["away", "away"],
];
const MOST_COLUMNS = 400;
// Clients that have a mark and a row of their own; counts are of all.
const MOST_SHOWN = 500;

export class Activity {
  constructor() {
    this.isKnown = false;
    this.isReal = false;
    this.work = "train";
    this.busy = new Set();
    this.away = new Set();
    this.failed = new Map();
    this.devices = [];
    this.rounds = new Map();
  }

  take(message) {
    switch (message.type) {
      case "wave":
        this.isKnown = true;
        this.work = message.kind;
        // Pushed work goes on beside other work; a wave is all that goes on.
        if (!message.is_pushed) this.busy.clear();
        this.away = new Set(message.away);
        for (const client of message.clients) this.busy.add(client);
        if (message.kind === "train") this.begin(message);
        break;
      case "answers":
        for (const client of message.done ?? []) this.answer(client, "done");
        for (const client of message.failed ?? []) this.answer(client, "failed");
        for (const client of message.missed ?? []) this.answer(client, "missed");
        break;
      case "presence":
        this.isKnown = true;
        // Only real clients come and go by themselves.
        this.isReal = true;
        this.away = new Set(message.away);
        break;
      case "devices":
        this.devices = message.names;
        break;
      case "failure":
        this.failed.set(message.client, message.reason);
        break;
      case "end":
      case "interrupted":
        this.busy.clear();
        this.work = "train";
        break;
    }
  }

  begin(message) {
    const key = message.server_round ?? `${message.task}/${message.round}`;
    // A resumed run does a round again; and work is pushed in several pieces.
    if (!message.is_pushed || !this.rounds.has(key)) {
      this.rounds.set(key, { name: `task ${message.task + 1}, round ${message.round}`, cells: new Map() });
      // Older ones are not shown any more.
      if (this.rounds.size > MOST_COLUMNS) this.rounds.delete(this.rounds.keys().next().value);
    }
    this.round = this.rounds.get(key);
    for (const client of message.clients) this.round.cells.set(client, "asked");
    for (const client of message.away ?? []) this.round.cells.set(client, "away");
  }

  answer(client, outcome) {
    this.busy.delete(client);
    if (outcome === "done") this.failed.delete(client);
    else if (!this.failed.has(client)) this.failed.set(client, "no answer came");
    if (this.work === "train" && this.round) this.round.cells.set(client, outcome);
  }

  // Nobody is at work in a run that does not go on, though its last work had no answer.
  stateOf(client, isGoing) {
    // Work for a real client that is not connected waits until it is back.
    if (isGoing && this.isReal && this.away.has(client)) return "away";
    if (isGoing && this.busy.has(client)) return "working";
    if (isGoing && this.away.has(client)) return "away";
    return this.failed.has(client) ? "failed" : "idle";
  }
}

function wordFor(run, state) {
  if (state === "away") return run.isReal ? "not connected" : "away";
  if (state !== "working") return state;
  if (run.state === "complete") return "training";
  const word = { train: "training", "train.end_task": "ending the task" }[run.activity.work];
  return word ?? "being scored";
}

const WORDS = { done: "trained", asked: "training", failed: "failed", missed: "gave no answer", away: "was away" };
const PAINTS = { done: "--done", asked: "--busy", failed: "--bad", missed: "--warn", away: "--line" };

export class ClientPanel {
  constructor() {
    this.list = document.getElementById("clients");
    this.counts = document.getElementById("client-counts");
    this.map = new CellMap(document.getElementById("maps"), "Clients over time", "One row a client, one column a round.", true);
    this.items = [];
    this.map.legend.append(
      ...[["idle", "trained"], ["working", "training"], ["failed", "failed"], ["missed", "no answer"], ["absent", "away"], ["none", "not asked"]].map(([key, text]) => {
        const item = element("span");
        item.append(element("span", { class: `key ${key}` }), text);
        return item;
      }),
    );
  }

  show(run) {
    const clients = run.about?.clients ?? 0;
    const shown = Math.min(clients, MOST_SHOWN);
    const { activity } = run;
    while (this.items.length > shown) this.items.pop().remove();
    while (this.items.length < shown) {
      const item = element("li");
      item.append(element("span", { class: "hidden" }), "", element("span", { class: "hidden" }));
      this.items.push(item);
      this.list.append(item);
    }
    const isGoing = run.state === "running" || run.state === "starting";
    const totals = { working: 0, idle: 0, failed: 0, away: 0 };
    for (let client = 0; client < clients; client += 1) totals[activity.stateOf(client, isGoing)] += 1;
    this.items.forEach((item, client) => {
      const state = activity.stateOf(client, isGoing);
      const device = activity.devices[client] ?? "";
      const reason = state === "failed" ? `: ${activity.failed.get(client)}` : "";
      const word = wordFor(run, state);
      item.className = state;
      item.title = `client ${client}${device && ` (${device})`}: ${word}${reason}`;
      item.childNodes[0].textContent = "client ";
      item.childNodes[1].data = String(client);
      item.childNodes[2].textContent = `${device && ` on ${device}`}, ${word}`;
    });
    this.counts.replaceChildren(
      ...STATES.filter(([state]) => totals[state] || state === "working").map(([state]) => {
        const item = element("span");
        item.append(element("span", { class: `key ${state}` }), `${totals[state]} ${wordFor(run, state)}`);
        return item;
      }),
    );
    if (shown < clients) this.counts.append(element("span", {}, `Shown below: the first ${shown} of ${clients} clients.`));
    if (!activity.isKnown) this.counts.append(element("span", {}, "This run does not tell which clients are at work."));
    this.showMap(run, shown);
  }

  showMap(run, clients) {
    const { activity } = run;
    const rounds = [...activity.rounds.values()].slice(-MOST_COLUMNS);
    const order = [...Array(clients).keys()];
    const deviceOf = (client) => activity.devices[client] ?? "";
    // Clients with the same device stand together.
    order.sort((one, other) => deviceOf(one).localeCompare(deviceOf(other), "en", { numeric: true }) || one - other);
    const names = order.map((client) => (deviceOf(client) ? `${client} ${deviceOf(client)}` : `client ${client}`));
    const cell = (row, column) => rounds[column].cells.get(order[row]);
    const troubled = rounds.filter((round) => [...round.cells.values()].some((each) => each === "failed" || each === "missed")).length;
    this.map.show({
      rows: names,
      columns: rounds,
      colour: (row, column, style) => style.getPropertyValue(PAINTS[cell(row, column)] ?? "--none"),
      tell: (row, column) => `${names[row]}, ${rounds[column].name}: ${WORDS[cell(row, column)] ?? "not asked"}`,
      label: `Clients over time: ${counted(rounds.length, "round")} of ${counted(clients, "client")}; in ${counted(troubled, "round")} a client failed or gave no answer`,
    });
  }
}
