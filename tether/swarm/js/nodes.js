// What Python can ask of hyperdht. A method takes values and returns values (JSON); keys and topics are hexadecimal.

const b4a = require('b4a')
const DHT = require('hyperdht')
const NoiseWrap = require('hyperdht/lib/noise-wrap')
const { control, host, outbox, putText } = require('./bridge')
const HandedStream = require('./handed')

// A handshake costs a millisecond and its traces stay for ten seconds: what a flood of them may take.
const HANDSHAKES_A_SECOND = 100
const HANDSHAKES_BURST = 300
const MAX_PEERS = 1000 // of one lookup: the nodes that answer may be hostile

const nodes = new Map()
const servers = new Map()
const connecting = new Map() // call to stream
let handles = 0

const bytes = hex => b4a.from(hex, 'hex')
const hex = bytes => b4a.toString(bytes, 'hex')

function nodeOf (handle) {
  const node = nodes.get(handle)
  if (node === undefined) throw Object.assign(new Error('this node is closed'), { code: 'NODE_DESTROYED' })
  return node
}

// Refuses by a handshake that fails, as one with garbage in it does.
class Handshakes {
  constructor (dht) {
    this.dht = dht
    this.left = HANDSHAKES_BURST
    this.at = Date.now()
  }

  create (keyPair, remotePublicKey) {
    const now = Date.now()
    this.left = Math.min(HANDSHAKES_BURST, this.left + Math.max(0, now - this.at) / 1000 * HANDSHAKES_A_SECOND)
    this.at = now
    if (this.left < 1) return { recv () { throw new Error('Too many handshakes') } }
    this.left--
    return new Handshake(this.dht, keyPair, remotePublicKey)
  }
}

// A peer may name this very node as the relay between both, which would have it connect to itself, and give the stream up when that fails.
class Handshake extends NoiseWrap {
  constructor (dht, keyPair, remotePublicKey) {
    super(keyPair, remotePublicKey)
    this.dht = dht
  }

  recv (buffer) {
    const payload = super.recv(buffer)
    const through = payload.relayThrough
    if (through && b4a.equals(through.publicKey, this.dht.defaultKeyPair.publicKey)) payload.relayThrough = null
    return payload
  }
}

// What hyperdht is to know for a stream to a peer: which relay it may use, if any, and it is not the peer itself.
function calling (dht, publicKey) {
  return {
    createHandshake: (keyPair, remotePublicKey) => new Handshake(dht, keyPair, remotePublicKey),
    relayThrough: dht.tetherRelays.filter(relay => !b4a.equals(relay, publicKey))
  }
}

// And for streams that peers open.
function called (dht, handle) {
  const handshakes = new Handshakes(dht)
  return {
    firewall: (key, payload, address) => firewall(handle, key, address),
    createHandshake: (keyPair, remotePublicKey) => handshakes.create(keyPair, remotePublicKey),
    relayThrough: () => dht.tetherRelays
  }
}

function firewall (handle, remotePublicKey, address) {
  outbox.set(remotePublicKey)
  control[0] = handle
  host.firewall()
  return control[0] !== 0
}

function onconnection (handle, stream) {
  stream.on('error', () => {}) // Python is told by its own stream
  control[0] = handle
  control[1] = stream.rawStream.handle
  host.connection()
}

async function opened (stream) {
  await new Promise((resolve, reject) => {
    stream.once('open', resolve)
    stream.once('error', reject)
    stream.once('close', () => reject(Object.assign(new Error('closed before it was open'), { code: 'PEER_CONNECTION_FAILED' })))
  })
  return { stream: stream.rawStream.handle }
}

async function peers (query) {
  const found = new Map()
  for await (const { peers } of query) {
    for (const { publicKey, relayAddresses } of peers) {
      if (found.size < MAX_PEERS) found.set(hex(publicKey), relayAddresses.map(({ host, port }) => [host, port]))
    }
  }
  return Array.from(found, ([publicKey, relays]) => ({ publicKey, relays }))
}

function relaysOf (node) {
  for (const server of node.listening) return server.relayAddresses
  return []
}

// Whether each server has told nodes of the DHT where it is to be found, since `wake` where that was called. One that failed to is tried
// again by hyperdht only after five minutes.
function isAnnounced (node) {
  for (const { _announcer: announcer } of node.listening) {
    if (announcer === null || announcer.relays.length === 0 || announcer.relays === announcer.tetherOld) return false
  }
  return node.listening.size > 0
}

const record = found => found && { value: hex(found.value), seq: found.seq, signature: hex(found.signature) }

module.exports.nodeOf = nodeOf
module.exports.calling = calling
module.exports.called = called
module.exports.newHandle = () => ++handles
module.exports.methods = {
  create ({ bootstrap, seed, host, port, ephemeral, firewalled, relays = [] }) {
    const keyPair = DHT.keyPair(bytes(seed))
    const options = { bootstrap, keyPair, host, port, nodes: [] }
    if (port === 0) options.port = [0, 0] // zero alone is taken for hyperdht's own port
    if (ephemeral !== null) options.ephemeral = ephemeral
    if (firewalled !== null) options.firewalled = firewalled
    const node = new DHT(options)
    node.tetherNode = ++handles
    node.tetherRelays = relays.map(bytes)
    nodes.set(handles, node)
    return { node: handles, publicKey: hex(keyPair.publicKey) }
  },

  // Throws where a socket can't be bound.
  async bound ({ node }) {
    await nodeOf(node).bind()
  },

  async ready ({ node }) {
    await nodeOf(node).fullyBootstrapped()
  },

  // Ask others for packets where they were not written to. hyperdht does so as it begins, if the first node that answers is quick, and then
  // after twenty minutes.
  async probe ({ node }) {
    await nodeOf(node)._updateNetworkState(true)
  },

  status ({ node }) {
    const dht = nodeOf(node)
    return {
      host: dht.host,
      port: dht.port,
      local: dht.io.serverSocket === null ? null : dht.localAddress(),
      firewalled: dht.firewalled,
      randomized: dht.randomized,
      ephemeral: dht.ephemeral,
      bootstrapped: dht.bootstrapped,
      online: dht.online,
      degraded: dht.degraded,
      announced: isAnnounced(dht),
      known: dht.nodes.length,
      punches: dht.stats.punches,
      relaying: dht.stats.relaying
    }
  },

  // Public keys of blind relays, one of which each stream from now on may use, whichever side opens it.
  relayThrough ({ node, relays }) {
    nodeOf(node).tetherRelays = relays.map(bytes)
  },

  // The server's number comes before its first connection can.
  listen ({ node }) {
    const dht = nodeOf(node)
    const handle = ++handles
    const server = dht.createServer({
      ...called(dht, handle),
      createSecretStream: (isInitiator, raw, options) => new HandedStream(dht, isInitiator, raw, options)
    }, stream => onconnection(handle, stream))
    servers.set(handle, server)
    return { server: handle }
  },

  async announced ({ server }) {
    await servers.get(server).listen()
  },

  async unlisten ({ server }) {
    const listening = servers.get(server)
    servers.delete(server)
    if (listening !== undefined) await listening.close()
  },

  async connect ({ node, publicKey }, call) {
    const dht = nodeOf(node)
    const key = bytes(publicKey)
    const stream = dht.connect(key, {
      ...calling(dht, key),
      createSecretStream: (isInitiator, raw, options) => new HandedStream(dht, isInitiator, raw, options)
    })
    stream.on('error', () => {})
    connecting.set(call, stream)
    try {
      return await opened(stream)
    } finally {
      connecting.delete(call)
    }
  },

  cancel ({ call }) {
    const stream = connecting.get(call)
    if (stream !== undefined) stream.destroy()
  },

  async announce ({ node, topic }) {
    const dht = nodeOf(node)
    const query = dht.announce(bytes(topic), dht.defaultKeyPair, relaysOf(dht))
    await query.finished()
    return { nodes: query.closestNodes.length }
  },

  async unannounce ({ node, topic }) {
    const dht = nodeOf(node)
    await dht.unannounce(bytes(topic), dht.defaultKeyPair)
  },

  async lookup ({ node, topic }) {
    return peers(nodeOf(node).lookup(bytes(topic)))
  },

  async mutablePut ({ node, value, seq, seed }) {
    const dht = nodeOf(node)
    const keyPair = seed === null ? dht.defaultKeyPair : DHT.keyPair(bytes(seed))
    const { closestNodes } = await dht.mutablePut(keyPair, bytes(value), { seq })
    return { nodes: closestNodes.length }
  },

  async mutableGet ({ node, publicKey, seq, latest }) {
    return record(await nodeOf(node).mutableGet(bytes(publicKey), { seq, latest }))
  },

  async immutablePut ({ node, value }) {
    const { hash } = await nodeOf(node).immutablePut(bytes(value))
    return { hash: hex(hash) }
  },

  async immutableGet ({ node, hash }) {
    const found = await nodeOf(node).immutableGet(bytes(hash))
    return found && { value: hex(found.value) }
  },

  async suspend ({ node }) {
    await nodeOf(node).suspend()
  },

  async resume ({ node }) {
    await nodeOf(node).resume()
  },

  // After a sleep, or in another network: what hyperdht does by and by, now. Nothing is cut, nothing is waited for.
  wake ({ node }) {
    const dht = nodeOf(node)
    dht._onwakeup()
    dht.refresh()
    for (const { _announcer: announcer } of dht.listening) {
      if (announcer === null) continue
      announcer.tetherOld = announcer.relays
      announcer.refresh()
      announcer._sleeper.resume()
    }
  },

  async destroy ({ node, force }) {
    const dht = nodes.get(node)
    if (dht === undefined) return
    for (const [handle, server] of servers) {
      if (server.dht === dht) servers.delete(handle)
    }
    await dht.destroy({ force })
    nodes.delete(node) // not before: who lost patience asks again, by force
  }
}
