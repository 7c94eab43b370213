// What the packages expect of Node and PythonMonkey lacks or does badly. Before everything else.

const { enqueue, report } = require('./bridge')
const timers = require('./timers')

globalThis.Promise = require('./promises')
globalThis.queueMicrotask = enqueue
globalThis.setTimeout = timers.setTimeout
globalThis.setInterval = timers.setInterval
globalThis.setImmediate = timers.setImmediate
globalThis.clearTimeout = globalThis.clearInterval = globalThis.clearImmediate = timers.clear

const say = (...words) => report(words.map(String).join(' '))
globalThis.console = { log: say, info: say, debug: say, warn: say, error: say, trace: say }
