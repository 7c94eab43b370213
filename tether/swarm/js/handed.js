// A secret stream that ends with the handshake: its keys go to Python (tether/swarm/engine/secure.py), which encrypts and decrypts from then
// on at three times the speed. Here it lives on so that hyperdht sees it open and close.

const NoiseSecretStream = require('@hyperswarm/secret-stream')
const relay = require('blind-relay')
const { control, outbox, host } = require('./bridge')

const DIRECT = 0
const PUNCHED = 1
const RELAYED = 2
const KEY = 32

class HandedStream extends NoiseSecretStream {
  constructor (dht, isInitiator, rawStream, options) {
    super(isInitiator, null, { ...options, autoStart: false })
    this.dht = dht
    if (rawStream !== null) this.start(rawStream, options)
  }

  _setupSecretStream (tx, rx, hash, publicKey, remotePublicKey) {
    this.publicKey = publicKey
    this.remotePublicKey = remotePublicKey
    this.handshakeHash = hash
    this._encrypt = this // what the parent looks at to know that the handshake is done
    this.rawStream.handed = true
    this.rawStream.on('remote-changed', () => this._tell(host.secureRoute))
    const parts = [
      tx.subarray(0, KEY), rx.subarray(0, KEY), remotePublicKey, hash,
      NoiseSecretStream.id(hash, this.isInitiator), NoiseSecretStream.id(hash, !this.isInitiator)
    ]
    let at = 0
    for (const part of parts) {
      outbox.set(part, at)
      at += part.byteLength
    }
    this._tell(host.secureStart)
    this.emit('handshake')
  }

  _tell (work) {
    const raw = this.rawStream
    control[0] = raw.handle
    control[1] = routeOf(this.dht, raw)
    control[2] = this.isInitiator ? 1 : 0
    control[3] = this.dht.tetherNode
    control[4] = raw.remoteNumber
    control[5] = raw.remotePort
    work()
  }

  // Python keeps alive what it writes to.
  setKeepAlive () {}
}

function routeOf (dht, raw) {
  const relay = raw.asked && raw.asked.rawStream
  if (relay && relay.socket === raw.socket && relay.remotePort === raw.remotePort && relay.remoteHost === raw.remoteHost) return RELAYED
  // hyperdht punches from sockets of this pool and from no other.
  return dht._socketPool.lookup(raw.socket) === null ? DIRECT : PUNCHED
}

// hyperdht does not say whether a stream runs through a relay; the relay's client is told which stream it pairs, before it is connected.
const { pair } = relay.Client.prototype
relay.Client.prototype.pair = function (isInitiator, token, raw) {
  raw.asked = this.stream
  return pair.call(this, isInitiator, token, raw)
}

module.exports = HandedStream
