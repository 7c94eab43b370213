// udx-native's face over the UDX of Python (tether/swarm/udx). IPv4, as hyperdht's messages know nothing else: an address crosses as
// an integer.

const b4a = require('b4a')
const EventEmitter = require('events')
const { Duplex } = require('streamx')
const { control, inbox, outbox, host, entry, putText } = require('./bridge')

const FAILED = 1
const MAX_TEXTS = 4096
const EMPTY = new Uint8Array(0)

const sockets = new Map() // handle to Socket, as long as it is bound
const streams = new Map() // handle to Stream, until Python says that it is closed
const texts = new Map() // address as an integer to its text: parsing each packet's anew would cost more than the packet
const watchers = new Set()
const lookups = new Map() // number to the promise of a name's address
let lastLookup = 0

function textOf (address) {
  let text = texts.get(address)
  if (text === undefined) {
    text = (address >>> 24) + '.' + ((address >>> 16) & 255) + '.' + ((address >>> 8) & 255) + '.' + (address & 255)
    if (texts.size === MAX_TEXTS) texts.clear()
    texts.set(address, text)
  }
  return text
}

function isIPv4 (host) {
  const parts = host.split('.')
  return parts.length === 4 && parts.every(part => /^\d{1,3}$/.test(part) && Number(part) < 256)
}

function numberOf (host) {
  if (!isIPv4(host)) throw new Error(host + ' is not a valid IP address')
  const parts = host.split('.')
  return ((parts[0] << 24) | (parts[1] << 16) | (parts[2] << 8) | parts[3]) >>> 0
}

function isPort (port) {
  return port > 0 && port < 65536
}

function received (nbytes) {
  return inbox.slice(0, nbytes)
}

function failure () {
  const [code, message] = b4a.toString(inbox.subarray(0, control[1])).split('\n')
  return Object.assign(new Error(message || code), { code })
}

class Socket extends EventEmitter {
  constructor (udx) {
    super()
    this.udx = udx
    this.streams = new Set()
    this.userData = null
    this._handle = 0
    this._host = null
    this._port = 0
    this._closing = null
    this._closed = false
  }

  get bound () { return this._port !== 0 }
  get closing () { return this._closing !== null }
  get idle () { return this.streams.size === 0 }
  get busy () { return this.streams.size > 0 }

  address () {
    return this.bound ? { host: this._host, family: 4, port: this._port } : null
  }

  bind (port = 0, address = '0.0.0.0') {
    if (this.bound) throw new Error('Already bound')
    if (this.closing) throw new Error('Socket is closed')
    control[0] = port
    control[1] = numberOf(address)
    host.socketBind()
    if (control[0] === FAILED) throw failure()
    this._handle = control[1]
    this._port = control[2]
    this._host = address
    sockets.set(this._handle, this)
    this.emit('listening')
  }

  async close () {
    if (this._closing === null) {
      this._closing = new Promise(resolve => this.once('close', resolve))
      this._closeMaybe()
    }
    return this._closing
  }

  _closeMaybe () {
    if (this._closed || !this.closing || this.busy) return this._closed
    this._closed = true
    if (this.bound) {
      sockets.delete(this._handle)
      control[0] = this._handle
      host.socketClose()
    }
    queueMicrotask(() => this.emit('close'))
    return true
  }

  _addStream (stream) {
    if (this.streams.has(stream)) return
    this.streams.add(stream)
    if (this.streams.size === 1) this.emit('busy')
  }

  _removeStream (stream) {
    if (!this.streams.delete(stream)) return
    const closed = this._closeMaybe()
    if (this.idle && !closed) this.emit('idle')
  }

  async send (bytes, port, address, ttl) {
    if (this.closing) return false
    this.trySend(bytes, port, address, ttl)
    return true
  }

  // A port that nobody can have is lost on the way, as with udx-native: hostile nodes name such neighbours, and an exception here would
  // leave the query that asks them waiting for ever.
  trySend (bytes, port, address, ttl) {
    if (this.closing || !isPort(port)) return
    const number = numberOf(address || '127.0.0.1')
    if (!this.bound) this.bind()
    outbox.set(bytes)
    control[0] = this._handle
    control[1] = bytes.byteLength
    control[2] = number
    control[3] = port
    control[4] = ttl || 0
    host.socketSend()
  }
}

class Stream extends Duplex {
  constructor (udx, id, { firewall = refuse } = {}) {
    super({ mapWritable: data => typeof data === 'string' ? b4a.from(data) : data, eagerOpen: true })
    this.udx = udx
    this.id = id
    this.socket = null
    this.remoteId = 0
    this.remoteHost = null
    this.remoteNumber = 0
    this.remoteFamily = 0
    this.remotePort = 0
    this.userData = null
    this.firewall = firewall
    this.handed = false // to Python: its bytes never come here
    this._closed = false
    this._paused = false
    this._written = null
    this._destroyed = null
    this._previous = null
    this._changing = null
    control[0] = id
    host.streamNew()
    this.handle = control[0]
    streams.set(this.handle, this)
  }

  get connected () { return this.socket !== null }
  get mtu () { return this._figures(1) }
  get rtt () { return this._figures(0) }
  get localHost () { return this.socket && this.socket.address().host }
  get localPort () { return this.socket ? this.socket.address().port : 0 }
  get localFamily () { return this.socket ? 4 : 0 }

  _figures (which) {
    control[0] = this.handle
    host.streamFigures()
    return control[which]
  }

  setKeepalive (ms) {
    control[0] = this.handle
    control[1] = ms
    host.streamKeepalive()
  }

  connect (socket, remoteId, port, address) {
    if (this._closed) return
    if (this.connected) throw new Error('Already connected')
    this._point(host.streamConnect, socket, remoteId, port, address)
    this.emit('connect')
  }

  changeRemote (socket, remoteId, port, address) {
    if (this._changing !== null) throw new Error('Remote already changing')
    if (!this.connected) throw new Error('Not yet connected')
    if (this.socket !== socket) this._previous = this.socket
    const changed = new Promise((resolve, reject) => { this._changing = { resolve, reject } })
    this._point(host.streamChange, socket, remoteId, port, address)
    return changed
  }

  _point (work, socket, remoteId, port, address = '127.0.0.1') {
    if (socket.closing) throw new Error('Socket is closed')
    if (!isPort(port)) throw new Error(port + ' is not a valid port')
    const number = numberOf(address)
    if (!socket.bound) socket.bind()
    this.socket = socket
    this.remoteId = remoteId
    this.remotePort = port
    this.remoteHost = address
    this.remoteNumber = number
    this.remoteFamily = 4
    control[0] = this.handle
    control[1] = socket._handle
    control[2] = remoteId
    control[3] = port
    control[4] = number
    work()
    socket._addStream(this)
  }

  relayTo (destination) {
    control[0] = this.handle
    control[1] = destination.handle
    host.streamRelay()
  }

  async send (bytes) {
    this.trySend(bytes)
    return this.connected
  }

  trySend (bytes) {
    if (!this.connected || this._closed) return
    this._put(bytes)
    host.streamMessage()
  }

  async flush () {
    return true
  }

  toJSON () {
    return { id: this.id, connected: this.connected, remoteHost: this.remoteHost, remotePort: this.remotePort }
  }

  _put (bytes) {
    outbox.set(bytes)
    control[0] = this.handle
    control[1] = bytes.byteLength
  }

  _read (done) {
    if (this._paused) this._pause(false)
    done(null)
  }

  _pause (paused) {
    this._paused = paused
    control[0] = this.handle
    control[1] = paused ? 1 : 0
    host.streamPause()
  }

  _writev (chunks, done) {
    let goOn = 1
    for (const chunk of chunks) {
      this._put(chunk)
      host.streamWrite()
      goOn = control[0]
    }
    if (goOn === 1) done(null)
    else this._written = done
  }

  _final (done) {
    control[0] = this.handle
    host.streamEnd()
    done(null)
  }

  _predestroy () {
    if (!this._closed) {
      control[0] = this.handle
      host.streamDestroy()
    }
    this._continue()
  }

  // Connected, the socket is in use until Python has closed the stream.
  _destroy (done) {
    if (streams.has(this.handle) && this.connected) this._destroyed = done
    else done(null)
  }

  _continue () {
    const done = this._written
    this._written = null
    if (done !== null) done(null)
  }

  _arrived (chunk) {
    if (!this.push(chunk) && !this._paused) this._pause(true)
  }

  _onclose (error) {
    this._closed = true
    streams.delete(this.handle)
    this._leave('socket')
    this._leave('_previous')
    if (this._changing !== null) this._changing.reject(new Error('Stream is closed'))
    this._changing = null
    const done = this._destroyed
    this._destroyed = null
    if (done !== null) done(error)
    else if (error !== null || this.handed) this.destroy(error)
  }

  _leave (which) {
    if (this[which] !== null) this[which]._removeStream(this)
    this[which] = null
  }

  _onchanged () {
    this._leave('_previous')
    if (this._changing !== null) this._changing.resolve()
    this._changing = null
    this.emit('remote-changed')
  }
}

function refuse () {
  return true
}

class Interfaces extends EventEmitter {
  constructor () {
    super()
    this.interfaces = readInterfaces()
    watchers.add(this)
  }

  async destroy () {
    watchers.delete(this)
  }

  [Symbol.iterator] () {
    return this.interfaces[Symbol.iterator]()
  }
}

function readInterfaces () {
  host.interfaces()
  return JSON.parse(b4a.toString(inbox.subarray(0, control[0])))
}

class UDX {
  static isIPv4 (host) { return isIPv4(host) }
  static isIPv6 (host) { return host.includes(':') }
  static isIP (host) { return isIPv4(host) ? 4 : UDX.isIPv6(host) ? 6 : 0 }

  createSocket () { return new Socket(this) }
  createStream (id, options) { return new Stream(this, id, options) }
  networkInterfaces () { return readInterfaces() }
  watchNetworkInterfaces () { return new Interfaces() }

  // Each time that it is needed: a machine that was offline at its start finds the bootstrap nodes later.
  lookup (name) {
    return new Promise((resolve, reject) => {
      lookups.set(++lastLookup, { resolve, reject })
      control[1] = putText(name)
      control[0] = lastLookup
      host.resolve()
    })
  }
}

// What Python calls. A stream or socket that is gone here may still have a call on its way.

function onStream (work) {
  return entry(() => {
    const stream = streams.get(control[0])
    if (stream !== undefined) work(stream)
  })
}

module.exports = UDX
module.exports.entries = {
  datagram: entry(() => {
    const socket = sockets.get(control[0])
    if (socket === undefined) return
    const remote = { host: textOf(control[2]), family: 4, port: control[3] }
    socket.emit('message', received(control[1]), remote)
  }),
  streamData: onStream(stream => { stream._arrived(received(control[1])) }),
  streamMessage: onStream(stream => { stream.emit('message', received(control[1])) }),
  streamEnd: onStream(stream => { stream.push(null) }),
  streamDrain: onStream(stream => { stream._continue() }),
  streamChanged: onStream(stream => { stream._onchanged() }),
  // The first bytes of a stream that Python reads, after its remote changed: hyperdht drops the relay on seeing some.
  streamAlive: onStream(stream => { stream.emit('message', EMPTY) }),
  streamClosed: onStream(stream => {
    const code = b4a.toString(received(control[1]))
    stream._onclose(code === '' ? null : Object.assign(new Error(code), { code }))
  }),
  resolved: entry(() => {
    const [number, status, address] = control
    const { resolve, reject } = lookups.get(number)
    lookups.delete(number)
    if (status === FAILED) reject(new Error('no such host'))
    else resolve({ host: textOf(address), family: 4 })
  }),
  // The answer stands in control[0]: 1 refuses the packet.
  streamFirewall: entry(() => {
    const [handle, socketHandle, port, address] = control
    const stream = streams.get(handle)
    const socket = sockets.get(socketHandle)
    control[0] = 1
    if (stream === undefined || socket === undefined || port === 0) return
    const refused = stream.firewall(socket, port, textOf(address), 4)
    control[0] = refused ? 1 : 0
  }),
  interfacesChanged: entry(() => {
    const interfaces = readInterfaces()
    for (const watcher of watchers) {
      watcher.interfaces = interfaces
      watcher.emit('change', interfaces)
    }
  })
}
