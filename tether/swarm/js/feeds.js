// Hyperbees: sorted keys on an append-only log that its publisher signs. Methods as in nodes.js.

const b4a = require('b4a')
const crypto = require('hypercore-crypto')
const DHT = require('hyperdht')
const Hyperbee = require('hyperbee')
const Hypercore = require('hypercore')
const { control, host } = require('./bridge')
const { nodeOf } = require('./nodes')
const storage = require('./files')

const CHANGES = { append: 0, truncate: 1, conflict: 2 }

const feeds = new Map()
let handles = 0

const bytes = hex => b4a.from(hex, 'hex')
const hex = bytes => b4a.toString(bytes, 'hex')
const quiet = stream => stream.on('error', () => {})

function feedOf (handle) {
  const feed = feeds.get(handle)
  if (feed === undefined) throw Object.assign(new Error('this feed is closed'), { code: 'SESSION_CLOSED' })
  return feed
}

async function head (core) {
  return { length: core.length, fork: core.fork, hash: hex(await core.treeHash()) }
}

// Whoever connects gets the feeds whose keys it knows: Hypercore's handshake asks for a proof of that.
function give (served, stream) {
  quiet(stream)
  for (const handle of served) {
    if (feeds.has(handle)) feeds.get(handle).core.replicate(stream)
  }
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
  async feedOpen ({ folder, seed, key }) {
    const options = seed === null ? { allowFork: false } : { keyPair: crypto.keyPair(bytes(seed)) }
    const core = new Hypercore(storage(folder), key && bytes(key), options)
    await core.ready()
    const bee = new Hyperbee(core, { keyEncoding: 'utf-8', valueEncoding: 'utf-8' })
    const handle = ++handles
    for (const [event, change] of Object.entries(CHANGES)) {
      core.on(event, () => {
        control[0] = handle
        control[1] = change
        host.feedChanged()
      })
    }
    feeds.set(handle, { core, bee })
    if (!core.writable) core.download({ start: 0, end: -1 })
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

  // A key of its own: what comes under it speaks Hypercore, and nothing else of the lab is reached by it.
  async feedServe ({ node, seed, feeds: served }) {
    const dht = nodeOf(node)
    const keyPair = DHT.keyPair(bytes(seed))
    const server = dht.createServer(stream => give(served, stream))
    await server.listen(keyPair)
    for (const handle of served) {
      const { core } = feedOf(handle)
      await dht.announce(core.discoveryKey, keyPair, server.relayAddresses).finished()
    }
    return { publicKey: hex(keyPair.publicKey) }
  },

  async feedFollow ({ node, feed, publicKey }) {
    const { core } = feedOf(feed)
    const stream = quiet(nodeOf(node).connect(bytes(publicKey)))
    await new Promise((resolve, reject) => stream.once('open', resolve).once('error', reject))
    core.replicate(stream)
    await core.update({ wait: true })
    return head(core)
  },

  async feedClose ({ feed }) {
    const found = feeds.get(feed)
    feeds.delete(feed)
    if (found !== undefined) await found.bee.close()
  }
}
