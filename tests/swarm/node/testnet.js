// A small DHT, and servers on it that the tests' Python programs connect to. Says where they are, in JSON; ends with its standard input.
// A line of standard input is a request, {"id", "op", …}; its answer is a line with the same id.

const createTestnet = require('@hyperswarm/testnet')
const DHT = require('hyperdht')
const b4a = require('b4a')
const readline = require('readline')

const keyPair = number => DHT.keyPair(b4a.alloc(32, number))
const say = value => process.stdout.write(JSON.stringify(value) + '\n')
const hex = bytes => b4a.toString(bytes, 'hex')
const bytes = hex => b4a.from(hex, 'hex')
const quiet = stream => stream.on('error', () => {})

const servers = {
  echo (stream) {
    stream.on('data', data => stream.write(data))
    stream.on('end', () => stream.end())
  },

  // Answers with how many bytes came.
  sink (stream) {
    let nbytes = 0
    stream.on('data', data => { nbytes += data.byteLength })
    stream.on('end', () => stream.end(b4a.from(String(nbytes))))
  },

  // Sends as many bytes as it is asked for.
  source (stream) {
    stream.once('data', data => {
      let left = Number(b4a.toString(data))
      const piece = b4a.alloc(65536, 5)
      const go = () => {
        while (left > 0) {
          const last = left < piece.byteLength
          const goOn = stream.write(last ? piece.subarray(0, left) : piece)
          left -= piece.byteLength
          if (!goOn) return stream.once('drain', go)
        }
        stream.end()
      }
      go()
    })
  },

  // Takes everything and says nothing.
  silent (stream) {
    stream.resume()
  },

  // Cuts the connection at the first message.
  rude (stream) {
    stream.once('data', () => stream.destroy())
  },

  // Alters what it sends, behind the cipher's back.
  garbling (stream) {
    stream.once('data', () => {
      const write = stream.rawStream.write.bind(stream.rawStream)
      stream.rawStream.write = data => { data[data.byteLength - 1] ^= 1; return write(data) }
      stream.write(b4a.from('altered on its way'))
    })
  }
}

const operations = {
  async echo ({ key, nbytes }, node) {
    const stream = quiet(node.connect(bytes(key)))
    const data = require('crypto').randomBytes(nbytes)
    const got = []
    await new Promise((resolve, reject) => {
      stream.once('error', reject)
      stream.on('data', piece => got.push(piece))
      stream.on('end', resolve)
      for (let at = 0; at < nbytes; at += 65536) stream.write(data.subarray(at, at + 65536))
      stream.end()
    })
    return { equal: b4a.equals(b4a.concat(got), data) }
  },

  // Throws where there is no connection.
  async connect ({ key }, node) {
    const stream = node.connect(bytes(key))
    await new Promise((resolve, reject) => stream.once('open', resolve).once('error', reject))
    stream.destroy()
    return {}
  },

  // Whether a stream opened in a second: hyperdht asks a server that does not answer for ten.
  async refused ({ key }, node) {
    const stream = quiet(node.connect(bytes(key)))
    const opened = await new Promise(resolve => {
      stream.once('open', () => resolve(true))
      setTimeout(resolve, 1000, false)
    })
    stream.destroy()
    return { opened }
  },

  // As `garbling`, but from the side that connects.
  async garble ({ key, how }, node) {
    const stream = node.connect(bytes(key))
    const closed = new Promise(resolve => quiet(stream).once('close', resolve))
    await new Promise((resolve, reject) => stream.once('open', resolve).once('error', reject))
    if (how === 'frame') stream.rawStream.write(b4a.concat([b4a.from([40, 0, 0]), b4a.alloc(40, 7)]))
    if (how === 'short') stream.rawStream.write(b4a.from([3, 0, 0, 1, 2, 3]))
    if (how === 'cut') stream.rawStream.end(b4a.from([255, 255, 255, 1]))
    await closed
    return {}
  },

  async feed ({ key, publisher, prefix }, node) {
    const Hypercore = require('hypercore')
    const Hyperbee = require('hyperbee')
    const folder = require('fs').mkdtempSync(require('path').join(require('os').tmpdir(), 'feed-'))
    const core = new Hypercore(folder, bytes(key))
    await core.ready()
    const bee = new Hyperbee(core, { keyEncoding: 'utf-8', valueEncoding: 'utf-8' })
    const stream = quiet(node.connect(bytes(publisher)))
    core.replicate(stream)
    await core.update({ wait: true })
    const found = []
    for await (const { key, value } of bee.createReadStream({ gte: prefix, lt: prefix + '\uffff' })) found.push([key, value])
    await bee.close()
    stream.destroy()
    require('fs').rmSync(folder, { recursive: true })
    return found
  },

  // Who asks for feeds here.
  self (_, node) {
    return { key: hex(node.defaultKeyPair.publicKey) }
  },

  // Logs that no Hyperbee wrote, each served under a key of its own: name to the keys of core and server.
  async hostileFeeds (_, node) {
    const Hypercore = require('hypercore')
    const { Header, Node, YoloIndex } = require('hyperbee/lib/messages')
    const index = seq => YoloIndex.encode({ levels: [{ keys: [seq], children: [seq, 0, seq, 0, seq, 0] }] })
    const entry = (key, value, seq) => Node.encode({ index: index(seq), key: b4a.from(key), value: value && b4a.from(value) })
    const logs = {
      circle: [entry('a', '1', 1), entry('b', null, 2)],
      garbage: [b4a.from('no entry')],
      large: [entry('a', b4a.alloc(70 << 10, 0x20), 1)],
      letters: [entry(b4a.from('eda080ff', 'hex'), '1', 1)],
      value: [entry('a', b4a.alloc(20 << 10, 0x20), 1)]
    }
    const found = {}
    for (const [name, blocks] of Object.entries(logs)) {
      const folder = require('fs').mkdtempSync(require('path').join(require('os').tmpdir(), 'hostile-'))
      const core = new Hypercore(folder)
      await core.append([Header.encode({ protocol: 'hyperbee' }), ...blocks])
      const server = node.createServer(stream => core.replicate(quiet(stream)))
      await server.listen(DHT.keyPair())
      process.on('exit', () => require('fs').rmSync(folder, { recursive: true }))
      found[name] = [hex(core.key), hex(server.publicKey)]
    }
    return found
  },

  async lookup ({ topic }, node) {
    const found = new Set()
    for await (const { peers } of node.lookup(bytes(topic))) for (const peer of peers) found.add(hex(peer.publicKey))
    return { peers: [...found] }
  },

  async announce ({ topic, seed }, node) {
    const { publicKey } = keyPair(seed)
    await node.announce(bytes(topic), keyPair(seed), []).finished()
    return { key: hex(publicKey) }
  },

  async mutablePut ({ seed, value, seq }, node) {
    await node.mutablePut(keyPair(seed), b4a.from(value), { seq })
    return { key: hex(keyPair(seed).publicKey) }
  },

  async mutableGet ({ key }, node) {
    const found = await node.mutableGet(bytes(key))
    return found && { value: b4a.toString(found.value), seq: found.seq }
  },

  async immutablePut ({ value }, node) {
    return { hash: hex((await node.immutablePut(b4a.from(value))).hash) }
  },

  async immutableGet ({ hash }, node) {
    const found = await node.immutableGet(bytes(hash))
    return found && { value: b4a.toString(found.value) }
  }
}

async function main () {
  const testnet = await createTestnet(5)
  const node = new DHT({ bootstrap: testnet.bootstrap })
  const keys = {}
  for (const [index, [name, serve]] of Object.entries(servers).entries()) {
    const server = node.createServer(stream => serve(quiet(stream)))
    await server.listen(keyPair(index + 1))
    keys[name] = hex(server.publicKey)
  }
  readline.createInterface({ input: process.stdin }).on('line', async line => {
    const { id, op, ...values } = JSON.parse(line)
    try {
      say({ id, ok: await operations[op](values, node) })
    } catch (error) {
      say({ id, error: error.message, code: error.code || '' })
    }
  }).on('close', () => process.exit(0))
  say({ bootstrap: testnet.bootstrap.map(({ port }) => ['127.0.0.1', port]), keys })
}

main()
