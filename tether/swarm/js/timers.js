// Timers on Python's monotonic clock: a heap here, one timer there. PythonMonkey's own leak, and their refresh() throws.
//
// A timer that was cleared or refreshed stays in the heap until its old time comes: cheaper than finding it, and a request's
// timeout is a second.

const { clock, control, host, entry, report, settled } = require('./bridge')

const heap = []
let turn = 0 // of `tick`: what a timer's work starts waits for the next one
let armed = Infinity // when Python will call

class Timer {
  constructor (work, delay, repeats, args) {
    this.work = work
    this.delay = delay
    this.repeats = repeats
    this.args = args
    this.active = true
    this.queued = false
    this.schedule()
  }

  schedule () {
    this.due = clock[0] + this.delay
    this.turn = turn
    if (this.queued) return
    this.queued = true
    this.at = this.due
    push(this)
  }

  refresh () {
    this.active = true
    this.schedule()
    return this
  }

  fire () {
    if (this.repeats) this.schedule()
    else this.active = false
    try {
      this.work(...this.args)
    } catch (error) {
      report(error)
    }
  }

  // Python's loop lives as long as the service does: nothing here keeps it.
  ref () { return this }
  unref () { return this }
  hasRef () { return false }
}

function push (timer) {
  let index = heap.push(timer) - 1
  while (index > 0) {
    const parent = (index - 1) >> 1
    if (heap[parent].at <= timer.at) break
    heap[index] = heap[parent]
    index = parent
  }
  heap[index] = timer
}

function pop () {
  const first = heap[0]
  const last = heap.pop()
  if (heap.length > 0) sink(last)
  first.queued = false
  return first
}

function sink (timer) {
  let index = 0
  for (;;) {
    let child = 2 * index + 1
    if (child >= heap.length) break
    if (child + 1 < heap.length && heap[child + 1].at < heap[child].at) child++
    if (heap[child].at >= timer.at) break
    heap[index] = heap[child]
    index = child
  }
  heap[index] = timer
}

const tick = entry(() => {
  armed = Infinity
  turn++
  const again = []
  while (heap.length > 0 && heap[0].at <= clock[0]) {
    const timer = pop()
    if (!timer.active) continue
    if (timer.due > clock[0] || timer.turn === turn) again.push(timer)
    else timer.fire()
  }
  for (const timer of again) requeue(timer)
})

function requeue (timer) {
  if (timer.queued) return
  timer.queued = true
  timer.at = timer.due
  push(timer)
}

// One call a turn at most, and only if the first timer comes earlier than the one that Python waits for.
settled(() => {
  while (heap.length > 0 && !heap[0].active) pop()
  if (heap.length === 0 || heap[0].at >= armed) return
  armed = heap[0].at
  control[0] = Math.max(0, Math.ceil(armed - clock[0]))
  host.wake()
})

function clear (timer) {
  if (timer instanceof Timer) timer.active = false
}

module.exports = {
  tick,
  setTimeout: (work, delay, ...args) => new Timer(work, Math.max(1, Number(delay) || 0), false, args),
  setInterval: (work, delay, ...args) => new Timer(work, Math.max(1, Number(delay) || 0), true, args),
  setImmediate: (work, ...args) => new Timer(work, 0, false, args),
  clear
}
