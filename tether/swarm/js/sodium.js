// sodium-native's face over libsodium in Python (tether/swarm/engine/sodium.py). Inputs lie end to end in the outbox, their lengths in the
// control block; the result comes behind them. Only what the bundled packages reach is here: anything else is undefined and throws.

const { control, outbox, host } = require('./bridge')

const FAILED = 1

// The bytes behind the inputs, where the result of `work` stands.
function call (work, inputs, outNbytes) {
  let at = 0
  for (let i = 0; i < inputs.length; i++) {
    outbox.set(inputs[i], at)
    at += control[i] = inputs[i].byteLength
  }
  control[inputs.length] = outNbytes
  work()
  return at
}

function take (at, target) {
  target.set(outbox.subarray(at, at + target.byteLength))
}

const EMPTY = new Uint8Array(0)
const STATE = 52
const TAG_FINAL = 3

function generichash (out, input, key) {
  take(call(host.hash, [key || EMPTY, input], out.byteLength), out)
}

function randomBytes (out) {
  take(call(host.random, [], out.byteLength), out)
}

function join (parts) {
  const whole = new Uint8Array(parts.reduce((nbytes, part) => nbytes + part.byteLength, 0))
  let at = 0
  for (const part of parts) {
    whole.set(part, at)
    at += part.byteLength
  }
  return whole
}

function seedKeypair (publicKey, secretKey, seed) {
  const at = call(host.signKeypair, [seed], 96)
  take(at, publicKey)
  take(at + 32, secretKey)
}

function verified (what) {
  if (control[0] === FAILED) throw new Error(what)
}

module.exports = {
  crypto_sign_PUBLICKEYBYTES: 32,
  crypto_sign_SECRETKEYBYTES: 64,
  crypto_sign_BYTES: 64,
  crypto_sign_SEEDBYTES: 32,
  crypto_generichash_BYTES: 32,
  crypto_generichash_BYTES_MIN: 16,
  crypto_generichash_BYTES_MAX: 64,
  crypto_generichash_KEYBYTES: 32,
  crypto_generichash_STATEBYTES: 384,
  crypto_hash_sha512_BYTES: 64,
  crypto_scalarmult_ed25519_BYTES: 32,
  crypto_scalarmult_ed25519_SCALARBYTES: 32,
  crypto_secretbox_NONCEBYTES: 24,
  crypto_secretbox_MACBYTES: 16,
  crypto_secretbox_KEYBYTES: 32,
  crypto_box_SEALBYTES: 48,
  crypto_box_PUBLICKEYBYTES: 32,
  crypto_box_SECRETKEYBYTES: 32,
  crypto_stream_NONCEBYTES: 24,
  crypto_stream_KEYBYTES: 32,
  crypto_aead_chacha20poly1305_ietf_NPUBBYTES: 12,
  crypto_aead_chacha20poly1305_ietf_ABYTES: 16,
  crypto_aead_chacha20poly1305_ietf_KEYBYTES: 32,
  crypto_secretstream_xchacha20poly1305_TAG_MESSAGE: 0,
  crypto_secretstream_xchacha20poly1305_TAG_FINAL: TAG_FINAL,
  crypto_secretstream_xchacha20poly1305_STATEBYTES: STATE,
  crypto_secretstream_xchacha20poly1305_KEYBYTES: 32,
  crypto_secretstream_xchacha20poly1305_HEADERBYTES: 24,
  crypto_secretstream_xchacha20poly1305_ABYTES: 17,
  crypto_secretstream_xchacha20poly1305_TAGBYTES: 1,

  crypto_generichash: generichash,
  crypto_generichash_batch: (out, parts, key) => generichash(out, join(parts), key),
  crypto_hash_sha512: (out, input) => take(call(host.sha512, [input], 64), out),

  randombytes_buf: randomBytes,
  randombytes_random () {
    const bytes = new Uint8Array(4)
    randomBytes(bytes)
    return new DataView(bytes.buffer).getUint32(0)
  },

  sodium_malloc: nbytes => new Uint8Array(nbytes),
  sodium_free: () => {},
  sodium_memzero: bytes => { bytes.fill(0) },
  sodium_increment (number) {
    let carry = 1
    for (let i = 0; i < number.byteLength; i++) {
      carry += number[i]
      number[i] = carry
      carry >>= 8
    }
  },

  crypto_sign_seed_keypair: seedKeypair,
  crypto_sign_keypair (publicKey, secretKey) {
    const seed = new Uint8Array(32)
    randomBytes(seed)
    seedKeypair(publicKey, secretKey, seed)
  },
  crypto_sign_ed25519_sk_to_pk: (publicKey, secretKey) => { publicKey.set(secretKey.subarray(32)) },
  crypto_sign_detached: (signature, message, secretKey) => take(call(host.sign, [secretKey, message], 64), signature),
  crypto_sign_verify_detached (signature, message, publicKey) {
    if (signature.byteLength !== 64 || publicKey.byteLength !== 32) return false
    call(host.verify, [signature, message, publicKey], 0)
    return control[0] !== FAILED
  },
  crypto_scalarmult_ed25519_noclamp (out, scalar, point) {
    const at = call(host.scalarmult, [scalar, point], 32)
    verified('not a point of the curve')
    take(at, out)
  },

  crypto_aead_chacha20poly1305_ietf_encrypt (cipher, message, additional, _secret, nonce, key) {
    take(call(host.aeadEncrypt, [message, additional || EMPTY, nonce, key], message.byteLength + 16), cipher)
    return message.byteLength + 16
  },
  crypto_aead_chacha20poly1305_ietf_decrypt (message, _secret, cipher, additional, nonce, key) {
    if (cipher.byteLength < 16) throw new Error('could not verify data')
    const at = call(host.aeadDecrypt, [cipher, additional || EMPTY, nonce, key], cipher.byteLength - 16)
    verified('could not verify data')
    take(at, message.subarray(0, cipher.byteLength - 16))
    return cipher.byteLength - 16
  },
  crypto_secretbox_easy: (cipher, message, nonce, key) => take(call(host.boxSeal, [message, nonce, key], message.byteLength + 16), cipher),
  crypto_secretbox_open_easy (message, cipher, nonce, key) {
    if (cipher.byteLength < 16) return false
    const at = call(host.boxOpen, [cipher, nonce, key], cipher.byteLength - 16)
    if (control[0] === FAILED) return false
    take(at, message)
    return true
  },

  // libsodium changes the state in place: it goes there and back with the message.
  crypto_secretstream_xchacha20poly1305_keygen: randomBytes,
  crypto_secretstream_xchacha20poly1305_init_push (state, header, key) {
    const at = call(host.streamInitPush, [key], STATE + 24)
    take(at, state)
    take(at + STATE, header)
  },
  crypto_secretstream_xchacha20poly1305_init_pull (state, header, key) {
    take(call(host.streamInitPull, [header, key], STATE), state)
  },
  crypto_secretstream_xchacha20poly1305_push (state, cipher, message, additional, tag) {
    control[4] = typeof tag === 'number' ? tag : tag[0]
    const at = call(host.streamPush, [state, message, additional || EMPTY], message.byteLength + 17)
    take(0, state)
    take(at, cipher.subarray(0, message.byteLength + 17))
    return message.byteLength + 17
  },
  crypto_secretstream_xchacha20poly1305_pull (state, message, tag, cipher, additional) {
    if (cipher.byteLength < 17) throw new Error('could not verify data')
    const at = call(host.streamPull, [state, cipher, additional || EMPTY], cipher.byteLength - 17)
    verified('could not verify data')
    take(0, state)
    take(at, message.subarray(0, cipher.byteLength - 17))
    if (tag) tag[0] = control[4]
    return cipher.byteLength - 17
  }
}
