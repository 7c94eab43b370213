// A lab that lends a worker to another one, of Holepunch's packages alone. A line of standard input is a request, {"id", "op", …}; its answer
// has the same id. What it says to the other lab and hears from it goes out in between as {"at": Unix time, "message", "value"}.

const RPC = require('@hyperswarm/rpc')
const DHT = require('hyperdht')
const crypto = require('crypto')
const readline = require('readline')

const say = value => process.stdout.write(JSON.stringify(value) + '\n')
const note = (message, value) => say({ at: (performance.timeOrigin + performance.now()) / 1000, message, value })
const json = value => Buffer.from(JSON.stringify(value))

let lab = null
let silent = false
const lent = { slots: 4, queue: 0.25, gpus: 1, models: 1 }

async function ask (method, value) {
  note('says ' + method, value)
  const answer = JSON.parse((await lab.request('tether/1/' + method, json(value))).toString())
  note('is answered ' + method, answer)
  return answer
}

// Not cached: it gets the version's manifest from the lab whose model it is, as the bytes would be got.
async function capacity (value) {
  const asked = JSON.parse(value.toString())
  note('hears capacity', asked)
  if (asked.load) await ask('manifest', { digest: asked.digest })
  return json({ slots: lent.slots, queue: lent.queue, cached: true, loaded: asked.load, error: null })
}

// Of a request's first input, rows of float32, the answer has as many rows of four sevens.
function infer (value) {
  const end = 4 + value.readUInt32LE(0)
  const head = JSON.parse(value.subarray(4, end).toString())
  note('hears infer', { model: head.model_name, nbytes: value.byteLength - end })
  const rows = head.inputs[0].shape[0]
  const tensor = Buffer.from(new Float32Array(4 * rows).fill(7).buffer)
  const output = { name: 'y', datatype: 'FP32', shape: [rows, 4], parameters: { binary_data_size: tensor.byteLength } }
  const text = json({ model_name: 'as this lab calls it', model_version: '1', outputs: [output] })
  const length = Buffer.alloc(4)
  length.writeUInt32LE(text.byteLength)
  return Buffer.concat([length, text, tensor])
}

function ping () {
  note('hears ping', null)
  return silent ? new Promise(() => {}) : json({ lent })
}

const operations = {
  async start ({ bootstrap, key, secret, name }) {
    const keyPair = DHT.keyPair(crypto.createHash('sha256').update(name).digest())
    const dht = new DHT({ bootstrap: bootstrap.map(([host, port]) => ({ host, port })), keyPair, host: '127.0.0.1' })
    const rpc = new RPC({ dht, keyPair })
    for (let tries = 50; ; tries--) { // it may not be announced yet
      lab = rpc.connect(Buffer.from(key, 'hex'))
      for (const [method, answer] of Object.entries({ ping, capacity, infer })) lab.rpc.respond('tether/1/' + method, answer)
      try {
        await ask('enrol', { secret })
        return keyPair.publicKey.toString('hex')
      } catch (err) {
        if (err.cause || tries === 0) throw err
        await new Promise(resolve => setTimeout(resolve, 200))
      }
    }
  },

  async register ({ offer }) {
    return ask('register', offer)
  },

  async silence () {
    silent = true
    note('falls silent', null)
    return null
  }
}

readline.createInterface({ input: process.stdin }).on('line', async line => {
  const { id, op, ...values } = JSON.parse(line)
  try {
    say({ id, ok: await operations[op](values) })
  } catch (err) {
    const { code, message } = err.cause || err
    say({ id, error: message, code: code || '' })
  }
}).on('close', () => process.exit(0))
