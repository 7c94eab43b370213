// Hypercore's files, by Python. Small and rare: a publisher's catalog grows by a few blocks a day, so the loop waits for them.
//
// What a publisher has signed and shown must not be forgotten: after a power cut it would sign something else at the same place, and
// its followers would call that a fork. So the blocks are on the disk before the log names them, and the log before anyone is told.
// A follower's copy is flushed never: its blocks are compared with the signed root when they are read, and fetched again.

const RandomAccessStorage = require('random-access-storage')
const b4a = require('b4a')
const { control, host, inbox, outbox, putText } = require('./bridge')

const FAILED = 1
const U32 = 0x100000000

class HostFile extends RandomAccessStorage {
  constructor (group, name) {
    super()
    this.group = group
    this.name = name
    this.number = 0
    group.files.set(name, this)
  }

  _open (request) {
    control[0] = putText(this.group.folder + '/' + this.name)
    host.fileOpen()
    if (control[0] === FAILED) return request.callback(failure())
    this.number = control[1]
    request.callback(null)
  }

  _read (request) {
    this._at(request.offset, request.size)
    host.fileRead()
    if (control[0] === FAILED) return request.callback(failure())
    if (control[1] < request.size) return request.callback(new Error('Could not satisfy length'))
    request.callback(null, inbox.slice(0, request.size))
  }

  _write (request) {
    try {
      const log = this.name === 'oplog'
      if (log) for (const file of this.group.files.values()) if (file !== this) file.sync()
      outbox.set(request.data)
      this._at(request.offset, request.data.byteLength)
      host.fileWrite()
      if (control[0] === FAILED) throw failure()
      if (log) this.sync()
    } catch (error) {
      return request.callback(error)
    }
    request.callback(null)
  }

  _truncate (request) {
    this._at(request.offset, 0)
    host.fileTruncate()
    request.callback(control[0] === FAILED ? failure() : null)
  }

  // Holes are not worth a system call here; only the end is cut.
  _del (request) {
    control[0] = this.number
    host.fileSize()
    const size = control[1] + control[2] * U32
    if (request.offset + request.size < size) return request.callback(null)
    this._truncate(request)
  }

  _stat (request) {
    control[0] = this.number
    host.fileSize()
    const size = control[1] + control[2] * U32
    request.callback(null, { size, blocks: Math.ceil(size / 512) })
  }

  _close (request) {
    control[0] = this.number
    host.fileClose()
    this.number = 0
    this.group.files.delete(this.name)
    request.callback(null)
  }

  sync () {
    if (this.number === 0 || !this.group.durable) return
    control[0] = this.number
    host.fileSync()
    if (control[0] === FAILED) throw failure()
  }

  _at (offset, nbytes) {
    control[0] = this.number
    control[1] = offset % U32
    control[2] = Math.floor(offset / U32)
    control[3] = nbytes
  }
}

function failure () {
  const [code, message] = b4a.toString(inbox.subarray(0, control[1])).split('\n')
  return Object.assign(new Error(message), { code })
}

// What Hypercore asks for its files: `name => file`, all in one folder.
module.exports = function storage (folder, { durable }) {
  const group = { folder, durable, files: new Map() }
  return name => new HostFile(group, name)
}
