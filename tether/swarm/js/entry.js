// The bundle: everything that Python calls hangs on globalThis.tetherEntries, everything that it may ask for is a method.

require('./platform')
const b4a = require('b4a')
const { control, entry, host, inbox, outbox } = require('./bridge')
const { tick } = require('./timers')
const udx = require('./udx')
const nodes = require('./nodes')
const feeds = require('./feeds')

const methods = { ...nodes.methods, ...feeds }
const names = Object.keys(methods)

const OK = 0
const FAILED = 1

function complete (call, status, value) {
  const body = b4a.from(JSON.stringify(value === undefined ? null : value))
  if (body.byteLength > outbox.byteLength) throw new Error(`the answer has ${body.byteLength} bytes, more than cross at once; ask for less`)
  outbox.set(body)
  control[0] = call
  control[1] = status
  control[2] = body.byteLength
  host.complete()
}

const failure = error => ({
  code: String((error && error.code) || ''),
  message: String((error && error.message) || error),
  stack: String((error && error.stack) || '')
})

async function answer (call, method, values) {
  try {
    complete(call, OK, await methods[names[method]](values, call))
  } catch (error) {
    complete(call, FAILED, failure(error))
  }
}

globalThis.tetherEntries = {
  ...udx.entries,
  tick,
  call: entry(() => {
    const [call, method, nbytes] = control
    answer(call, method, JSON.parse(b4a.toString(inbox.subarray(0, nbytes))))
  })
}
globalThis.tetherNames = Object.keys(globalThis.tetherEntries).join(' ')
globalThis.tetherMethods = names.join(' ')
