// One end of a raw udx-native stream: `node udx_node.js send|receive SECONDS`. Prints its port, reads the peer's from stdin, and the
// receiver prints what came. Finds its packages by NODE_PATH.
const UDX = require('udx-native')
const readline = require('readline')

const [,, role, seconds] = process.argv
const udx = new UDX()
const socket = udx.createSocket()
socket.bind(0, '127.0.0.1')
console.log(JSON.stringify({ port: socket.address().port }))

const cpuTimes = () => { const { user, system } = process.cpuUsage(); return [user / 1e6, system / 1e6] }
const before = cpuTimes()

const report = (nbytes, began) => {
  console.log(JSON.stringify({ nbytes, seconds: began && (Date.now() - began) / 1000, before, after: cpuTimes() }))
}

readline.createInterface({ input: process.stdin }).once('line', port => {
  const [ours, theirs] = role === 'receive' ? [1, 2] : [2, 1]
  const stream = udx.createStream(ours)
  let nbytes = 0
  let began = 0
  stream.on('data', data => { began ||= Date.now(); nbytes += data.byteLength })
  if (role === 'receive') {
    stream.on('end', () => { report(nbytes, began); stream.end() })
    stream.on('close', () => process.exit(0))
    stream.connect(socket, theirs, +port, '127.0.0.1')
    return
  }
  stream.on('close', () => { report(nbytes, began); process.exit(0) })
  stream.connect(socket, theirs, +port, '127.0.0.1')
  const block = Buffer.alloc(65536, 7)
  const end = Date.now() + seconds * 1000
  const write = () => {
    while (Date.now() < end) {
      nbytes += block.length
      if (!stream.write(block)) return stream.once('drain', write)
    }
    stream.end()
  }
  write()
})
