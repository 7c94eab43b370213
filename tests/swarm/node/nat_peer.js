// A peer in a process of its own, as ../nat_peer.py, of Holepunch's packages alone. A request is a line, {"id", "op", …}; its answer has the same id.

const DHT = require('hyperdht')
const relay = require('blind-relay')
const crypto = require('crypto')
const readline = require('readline')

const nodes = new Map()
const streams = []
const accepted = []
const closed = new Map()
const say = value => process.stdout.write(JSON.stringify(value) + '\n')
const bytes = hex => Buffer.from(hex, 'hex')
const digest = () => crypto.createHash('blake2b512')

// As the engine tells it: hyperdht punches from sockets of its pool only, and what is relayed goes where the relay was asked.
function route (node, { rawStream: raw }) {
  const relay = raw.asked && raw.asked.rawStream
  if (relay && relay.socket === raw.socket && relay.remotePort === raw.remotePort && relay.remoteHost === raw.remoteHost) return 'relayed'
  return node._socketPool.lookup(raw.socket) === null ? 'direct' : 'punched'
}

const { pair } = relay.Client.prototype
relay.Client.prototype.pair = function (isInitiator, token, raw) {
  raw.asked = this.stream
  return pair.call(this, isInitiator, token, raw)
}

function arrived (node, stream) {
  accepted.push({ node, stream })
  const hash = digest()
  stream.on('error', () => {})
  stream.on('data', piece => hash.update(piece))
  stream.on('end', () => stream.end(hash.digest()))
}

const operations = {
  async start ({ name, bootstrap, relay_through: through, host, ephemeral, firewalled }) {
    const options = { bootstrap: bootstrap.map(([host, port]) => ({ host, port })), keyPair: DHT.keyPair(crypto.createHash('sha256').update(name).digest()), port: [0, 0] }
    if (host !== undefined) options.host = host
    if (ephemeral !== undefined) options.ephemeral = ephemeral
    if (firewalled !== undefined) options.firewalled = firewalled
    const node = new DHT(options)
    node.through = through === undefined ? null : bytes(through)
    nodes.set(name, node)
    await node.fullyBootstrapped()
    return node.defaultKeyPair.publicKey.toString('hex')
  },

  async listen ({ name }) {
    const node = nodes.get(name)
    await node.createServer({ relayThrough: node.through }, stream => arrived(node, stream)).listen()
    return null
  },

  // A blind relay under this node's key.
  async begin_relay ({ name }) {
    const node = nodes.get(name)
    const server = new relay.Server({ createStream: options => node.createRawStream({ ...options, framed: true }) })
    await node.createServer(stream => {
      stream.on('error', () => {})
      server.accept(stream, { id: stream.remotePublicKey }).on('error', () => {})
    }).listen()
    return null
  },

  async status ({ name }) {
    const node = nodes.get(name)
    return { address: [node.host, node.port], firewalled: node.firewalled, randomized: node.randomized, online: node.online, known: node.nodes.length, punches: node.stats.punches, relaying: node.stats.relaying }
  },

  async connect ({ name, key }) {
    const node = nodes.get(name)
    const began = performance.now()
    const stream = node.connect(bytes(key), { relayThrough: node.through })
    await new Promise((resolve, reject) => stream.once('open', resolve).once('error', reject))
    const number = streams.push({ node, stream }) - 1
    stream.on('error', error => closed.set(number, error.message))
    stream.on('close', () => { if (!closed.has(number)) closed.set(number, null) })
    return { stream: number, seconds: (performance.now() - began) / 1e3, route: route(node, stream), address: [stream.rawStream.remoteHost, stream.rawStream.remotePort] }
  },

  async push ({ stream: number, nbytes }) {
    const { node, stream } = streams[number]
    const own = digest()
    const template = crypto.randomBytes(65536)
    const began = performance.now()
    const answer = new Promise((resolve, reject) => stream.once('data', resolve).once('error', reject))
    for (let at = 0; at < nbytes; at += template.byteLength) {
      const piece = Buffer.from(template.subarray(0, nbytes - at))
      piece.writeUInt32LE(at / template.byteLength)
      own.update(piece)
      if (!stream.write(piece)) await new Promise(resolve => stream.once('drain', resolve))
    }
    stream.end()
    const theirs = await answer
    return { equal: theirs.equals(own.digest()), seconds: (performance.now() - began) / 1e3, route: route(node, stream) }
  },

  async route ({ stream: number }) {
    const { node, stream } = streams[number]
    return route(node, stream)
  },

  async seen () {
    return accepted.map(({ node, stream }) => ({ peer: stream.remotePublicKey.toString('hex'), route: route(node, stream), address: [stream.rawStream.remoteHost, stream.rawStream.remotePort] }))
  }
}

readline.createInterface({ input: process.stdin }).on('line', async line => {
  const { id, op, ...values } = JSON.parse(line)
  try {
    say({ id, ok: await operations[op](values) })
  } catch (error) {
    say({ id, error: error.name, message: error.message, code: error.code || '' })
  }
}).on('close', () => process.exit(0))
