// Whole messages over TCP, each with its length before it in three bytes: in place of a secure stream, and a DHT that hands such streams out.
const net = require('net')
const EventEmitter = require('events')
const { Duplex } = require('streamx')

class Framed extends Duplex {
  constructor (socket, isInitiator, publicKey, remotePublicKey) {
    super()
    this.socket = socket
    this.isInitiator = isInitiator
    this.publicKey = publicKey
    this.remotePublicKey = remotePublicKey
    this.userData = null
    this.opened = Promise.resolve(true)
    this.pending = Buffer.alloc(0)
    socket.on('data', (data) => this.take(data))
    socket.on('end', () => this.push(null))
    socket.on('error', (err) => this.destroy(err))
    socket.on('close', () => this.destroy())
  }

  take (data) {
    this.pending = Buffer.concat([this.pending, data])
    while (this.pending.length >= 3) {
      const end = 3 + this.pending.readUIntLE(0, 3)
      if (this.pending.length < end) return
      this.push(this.pending.subarray(3, end))
      this.pending = this.pending.subarray(end)
    }
  }

  _write (data, cb) {
    const head = Buffer.alloc(3)
    head.writeUIntLE(data.length, 0, 3)
    this.socket.write(Buffer.concat([head, data]), () => cb(null))
  }

  _final (cb) {
    this.socket.end()
    cb(null)
  }

  _destroy (cb) {
    this.socket.destroy()
    cb(null)
  }
}

class Server extends EventEmitter {
  constructor (dht) {
    super()
    this.publicKey = dht.publicKey
    this.closed = false
    this.server = net.createServer((socket) => {
      this.emit('connection', new Framed(socket, false, dht.publicKey, dht.remotePublicKey))
    })
  }

  async listen () {
    await new Promise((resolve) => this.server.listen(0, '127.0.0.1', resolve))
    this.emit('listening')
  }

  address () {
    return this.server.address()
  }

  async close () {
    this.closed = true
    this.server.close()
    this.emit('close')
  }
}

exports.dht = (publicKey, remotePublicKey, port) => ({
  publicKey,
  remotePublicKey,
  createServer () {
    return new Server(this)
  },
  connect (key) {
    return new Framed(net.connect(port, '127.0.0.1'), true, publicKey, key)
  },
  async destroy () {}
})
