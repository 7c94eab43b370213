// Hyperbees: sorted keys on an append-only log that its publisher signs. Methods as in nodes.js.

const b4a = require('b4a')
const crypto = require('hypercore-crypto')
const DHT = require('hyperdht')
const Hyperbee = require('hyperbee')
const Hypercore = require('hypercore')
const { control, host } = require('./bridge')
const { nodeOf, called, calling, newHandle } = require('./nodes')
const storage = require('./files')

const CHANGES = { append: 0, truncate: 1, conflict: 2 }
const ENDED = 3 // the connection over which a feed is followed
const MAX_BLOCK_NBYTES = 64 << 10 // a key, a value of 16 KiB at most, and what of the tree was new
const BLOCK_MILLISECONDS = 10000
const ANNOUNCE_MILLISECONDS = 600000 // nodes of the DHT forget after twenty minutes

const feeds = new Map()
const servers = new Map()
let handles = 0

const bytes = hex => b4a.from(hex, 'hex')
const hex = bytes => b4a.toString(bytes, 'hex')
const quiet = stream => stream.on('error', () => {})
const failure = (code, message) => Object.assign(new Error(message), { code })

function feedOf (handle) {
  const feed = feeds.get(handle)
  if (feed === undefined) throw failure('SESSION_CLOSED', 'this feed is closed')
  return feed
}

function tell (handle, change) {
  control[0] = handle
  control[1] = change
  host.feedChanged()
}

async function head (core) {
  return { length: core.length, fork: core.fork, hash: hex(await core.treeHash()), nbytes: core.byteLength }
}

async function close (handle) {
  const found = feeds.get(handle)
  feeds.delete(handle)
  if (found === undefined) return
  if (found.stream !== null) found.stream.destroy()
  await found.bee.close()
}

// Whoever connects gets the feeds whose keys it knows: Hypercore's handshake asks for a proof of that. One connection a peer: one that
// was away comes again before its old one is given up.
function give (server, stream) {
  quiet(stream)
  const peer = hex(stream.remotePublicKey)
  const before = server.streams.get(peer)
  server.streams.set(peer, stream)
  if (before !== undefined) before.destroy()
  stream.once('close', () => { if (server.streams.get(peer) === stream) server.streams.delete(peer) })
  for (const handle of server.served) {
    if (feeds.has(handle)) feeds.get(handle).core.replicate(stream)
  }
}

// For programs that know a feed's key and nothing else. Who was told the server's key needs no topic, so a network where nobody keeps one
// keeps nobody from following.
async function announce ({ dht, keyPair, server, served }) {
  for (const handle of served) {
    if (!feeds.has(handle)) continue
    try {
      await dht.announce(feeds.get(handle).core.discoveryKey, keyPair, server.relayAddresses).finished()
    } catch {}
  }
}

function forget (handle) {
  clearInterval(servers.get(handle)?.timer)
  servers.delete(handle)
}

function serverOf (handle) {
  const server = servers.get(handle)
  if (server === undefined) throw failure('SESSION_CLOSED', 'this server is closed')
  return server
}

async function entries (stream, limit) {
  const found = []
  for await (const { seq, type, key, value } of stream) {
    found.push({ seq, type: type || 'put', key, value })
    if (found.length === limit) break
  }
  return found
}

module.exports = {
  // `whole`: another's feed is fetched as it grows, without being asked for.
  async feedOpen ({ node, folder, seed, key, whole }) {
    const dht = nodeOf(node)
    const options = seed === null ? { allowFork: false } : { keyPair: crypto.keyPair(bytes(seed)) }
    const core = new Hypercore(storage(folder, { durable: seed !== null }), key && bytes(key), options)
    await core.ready()
    const bee = new Hyperbee(core, { keyEncoding: 'utf-8', valueEncoding: 'utf-8' })
    const handle = ++handles
    for (const [event, change] of Object.entries(CHANGES)) core.on(event, () => tell(handle, change))
    feeds.set(handle, { core, bee, stream: null })
    dht.once('close', () => close(handle)) // two that have one log open would write over each other
    if (whole && !core.writable) core.download({ start: 0, end: -1 })
    return { feed: handle, key: hex(core.key), topic: hex(core.discoveryKey), writable: core.writable, ...await head(core) }
  },

  async feedHead ({ feed }) {
    return head(feedOf(feed).core)
  },

  // One batch: all of it is in the log, or nothing.
  async feedPut ({ feed, changes }) {
    const { bee, core } = feedOf(feed)
    const batch = bee.batch()
    for (const [key, value] of changes) {
      if (value === null) await batch.del(key)
      else await batch.put(key, value)
    }
    await batch.flush()
    return head(core)
  },

  async feedGet ({ feed, key, length }) {
    const { bee } = feedOf(feed)
    const found = await (length === null ? bee : bee.checkout(length)).get(key)
    return found && found.value
  },

  async feedRange ({ feed, first, behind, limit, length }) {
    const { bee } = feedOf(feed)
    const range = { gte: first, lt: behind, limit }
    return entries((length === null ? bee : bee.checkout(length)).createReadStream(range), limit)
  },

  async feedHistory ({ feed, first, limit }) {
    const { bee, core } = feedOf(feed)
    return entries(bee.createHistoryStream({ gte: Math.max(1, first), lt: core.length, limit }), limit)
  },

  // The log as it is, from block `first` to before `behind`, or as far as `nbytes` go, in hexadecimal. The tree of another's feed is not
  // walked: it can be made to lead round in circles.
  async feedBlocks ({ feed, first, behind, nbytes }) {
    const { core } = feedOf(feed)
    const blocks = []
    const download = core.download({ start: first, end: behind })
    try {
      for (let next = first, got = 0; next < behind && got < nbytes; next++) {
        const block = await core.get(next, { timeout: BLOCK_MILLISECONDS })
        if (block.byteLength > MAX_BLOCK_NBYTES) throw failure('MALFORMED', `block ${next} has ${block.byteLength} bytes`)
        got += block.byteLength
        blocks.push(hex(block))
      }
      return blocks
    } finally {
      download.destroy()
    }
  },

  // A key of its own: what comes under it speaks Hypercore, and nothing else of the lab is reached by it. The number comes before the
  // first connection can, and with it the firewall.
  feedServe ({ node, seed }) {
    const dht = nodeOf(node)
    const handle = newHandle()
    const keyPair = DHT.keyPair(bytes(seed))
    const made = { dht, keyPair, server: null, served: [], streams: new Map() }
    made.server = dht.createServer(called(dht, handle), stream => give(made, stream))
    servers.set(handle, made)
    made.timer = setInterval(announce, ANNOUNCE_MILLISECONDS, made)
    dht.once('close', () => forget(handle))
    return { server: handle, publicKey: hex(keyPair.publicKey) }
  },

  // These feeds and no others, announced on their topics. Who is connected connects again.
  async feedOffer ({ server, feeds: offered }) {
    const { dht, keyPair, server: listening, served, streams } = serverOf(server)
    const before = served.splice(0, served.length, ...offered)
    for (const stream of streams.values()) stream.destroy()
    if (listening.address() === null) await listening.listen(keyPair)
    for (const handle of before) {
      if (offered.includes(handle) || !feeds.has(handle)) continue
      try {
        await dht.unannounce(feeds.get(handle).core.discoveryKey, keyPair)
      } catch {}
    }
    await announce(serverOf(server))
  },

  // At once, whatever was under way.
  feedCut ({ server, publicKey }) {
    const stream = serverOf(server).streams.get(publicKey)
    if (stream !== undefined) stream.destroy()
  },

  async feedUnserve ({ server }) {
    const found = servers.get(server)
    if (found === undefined) return
    forget(server)
    for (const stream of found.streams.values()) stream.destroy()
    await found.server.close()
  },

  async feedFollow ({ node, feed, publicKey }) {
    const found = feedOf(feed)
    if (found.stream !== null) found.stream.destroy()
    const dht = nodeOf(node)
    const key = bytes(publicKey)
    const stream = found.stream = quiet(dht.connect(key, calling(dht, key)))
    stream.once('close', () => { if (found.stream === stream) tell(feed, ENDED) })
    await new Promise((resolve, reject) => {
      stream.once('open', resolve)
      stream.once('error', reject)
      stream.once('close', () => reject(failure('PEER_CONNECTION_FAILED', 'closed before it was open')))
    })
    found.core.replicate(stream)
    await found.core.update({ wait: true })
    return head(found.core)
  },

  async feedClose ({ feed }) {
    await close(feed)
  }
}
