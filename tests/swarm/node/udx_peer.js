// A peer of udx-native that does what it is told, one JSON object a line, and tells what happens in the same way.
// node udx_peer.js [HOST]: two sockets on HOST, whose ports are the first line it prints.
const UDX = require('udx-native')
const crypto = require('crypto')
const readline = require('readline')

const host = process.argv[2] || '127.0.0.1'
const udx = new UDX()
const sockets = [udx.createSocket(), udx.createSocket()]
const streams = new Map()
const say = event => process.stdout.write(JSON.stringify(event) + '\n')
const sha = () => crypto.createHash('sha256')

for (const socket of sockets) socket.bind(0, host)
say({ ports: sockets.map(socket => socket.address().port) })

// Bytes that both sides know from a seed: a counter, hashed.
function bytes (seed, nbytes) {
  const parts = []
  for (let at = 0, n = 0; at < nbytes; at += 32, n++) parts.push(sha().update(seed + ' ' + n).digest())
  return Buffer.concat(parts).subarray(0, nbytes)
}

function create ({ id, accept }) {
  const firewall = (socket, port, from) => {
    say({ id, event: 'asked', port, from })
    if (accept) streams.get(id).stream.connect(socket, accept, port, from)
    return !accept
  }
  const stream = udx.createStream(id, { firewall })
  const state = { stream, hash: sha(), nbytes: 0 }
  streams.set(id, state)
  stream.on('data', data => { state.hash.update(data); state.nbytes += data.byteLength })
  stream.on('end', () => say({ id, event: 'end', nbytes: state.nbytes, sha: state.hash.digest('hex') }))
  stream.on('message', data => say({ id, event: 'message', data: data.toString() }))
  stream.on('error', error => say({ id, event: 'error', code: error.code }))
  stream.on('close', () => say({ id, event: 'close' }))
  stream.on('remote-changed', () => say({ id, event: 'moved' }))
}

const commands = {
  create,
  connect: ({ id, socket, remote, port }) => streams.get(id).stream.connect(sockets[socket || 0], remote, port, host),
  write: ({ id, seed, nbytes }) => streams.get(id).stream.write(bytes(seed, nbytes)),
  end: ({ id }) => streams.get(id).stream.end(),
  destroy: ({ id }) => streams.get(id).stream.destroy(),
  message: ({ id, data }) => streams.get(id).stream.trySend(Buffer.from(data)),
  keepalive: ({ id, ms }) => streams.get(id).stream.setKeepalive(ms),
  change: ({ id, socket, remote, port }) => streams.get(id).stream.changeRemote(sockets[socket], remote, port, host)?.catch(() => {}), // null: nothing was on its way, and it has moved already
  relay: ({ id, to }) => streams.get(id).stream.relayTo(streams.get(to).stream),
  nbytes: ({ id }) => say({ id, event: 'nbytes', nbytes: streams.get(id).nbytes }),
  exit: () => process.exit(0)
}

readline.createInterface({ input: process.stdin }).on('line', line => {
  const command = JSON.parse(line)
  commands[command.do](command)
}).on('close', () => process.exit(0))
