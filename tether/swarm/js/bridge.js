// The border with Python: shared memory, calls across it, and what runs when a call returns.
//
// PythonMonkey leaks whatever value crosses: bytes for good, numbers 24 bytes each, functions read through a proxy 230. So nothing
// crosses. Both sides see one ArrayBuffer; a call takes no argument and returns nothing, its arguments lie in the control block and
// its bytes in a ring. tether/swarm/engine/bridge.py has the same layout.
//
// A callee reads its arguments before it calls anything else: a call that comes back (Python asks JavaScript's firewall while
// JavaScript connects) writes to the same block.

const b4a = require('b4a')

const CONTROL_NBYTES = 256
const CLOCK_AT = 256
const INBOX_AT = 4096
// One frame of a secret stream (16 MiB) and what stands round it. Pages that were never touched cost nothing.
const RING_NBYTES = (16 << 20) + (64 << 10)
const MAX_TEXT = 8192 // characters of one report

const memory = new ArrayBuffer(INBOX_AT + 2 * RING_NBYTES)
const control = new Uint32Array(memory, 0, CONTROL_NBYTES / 4)
const clock = new Float64Array(memory, CLOCK_AT, 1) // milliseconds, monotonic; Python writes it before each call
const inbox = new Uint8Array(memory, INBOX_AT, RING_NBYTES) // Python to JavaScript
const outbox = new Uint8Array(memory, INBOX_AT + RING_NBYTES, RING_NBYTES) // JavaScript to Python

// A Python function read through the proxy is a new object each time: read once.
const host = {}
for (const name of Object.keys(globalThis.tetherHost)) host[name] = globalThis.tetherHost[name]
globalThis.tetherHost = undefined
host.memory(new Uint8Array(memory)) // the one value that crosses; modules hash as they load, so Python needs it now

const jobs = []
const afterwards = []
let depth = 0

// Python may call the function that this returns. Promise jobs run when the outermost call is done, as microtasks do in a browser;
// an exception is reported and never crosses.
function entry (work) {
  return () => {
    depth++
    try {
      work()
    } catch (error) {
      report(error)
    }
    if (depth === 1) settle()
    depth--
  }
}

function settle () {
  for (let next = 0; next < jobs.length; next++) {
    const job = jobs[next]
    jobs[next] = undefined // a long run of jobs does not hold what the early ones held
    try {
      job()
    } catch (error) {
      report(error)
    }
  }
  jobs.length = 0
  for (const work of afterwards) work()
}

function enqueue (job) {
  jobs.push(job)
}

// `work` is done at the end of every outermost call, after the jobs.
function settled (work) {
  afterwards.push(work)
}

function report (error) {
  control[0] = putText(describe(error))
  host.log()
}

function describe (error) {
  if (!(error instanceof Error)) return String(error)
  return error.stack ? error.message + '\n' + error.stack : error.message
}

// Bytes of `text` in UTF-8 to the outbox; how many they are.
function putText (text) {
  const bytes = b4a.from(text.slice(0, MAX_TEXT))
  outbox.set(bytes)
  return bytes.byteLength
}

module.exports = { control, clock, inbox, outbox, host, entry, enqueue, settled, report, putText }
